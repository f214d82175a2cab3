"""The page of `podgate matrix -o html` in a real browser: opened from a file, looked at, driven."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import Browser, page_of
from selenium.webdriver.common.keys import Keys

from dataplane.model import (
    Direction,
    Key,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicyRule,
    Pod,
    Snapshot,
)
from dataplane.report import explanations
from dataplane.sources.directory import read_paths

ROOT = Path(__file__).parents[2]
SHOP = "docs/shop.yaml"
EXTERNALS = ["203.0.113.9", "203.0.113.70"]
# Rows and columns of the shop, in order: namespace, application, how many.
APPS = (
    ("kube-system/coredns", 2),
    ("monitoring/grafana", 1),
    ("monitoring/prometheus", 2),
    ("orders/api", 6),
    ("orders/db", 3),
    ("orders/worker", 5),
    ("payments/db", 2),
    ("payments/gateway", 3),
    ("payments/ledger", 4),
    ("storefront/cache", 3),
    ("storefront/web", 9),
)
ORDER = [f"{app}-{number}" for app, count in APPS for number in range(count)] + EXTERNALS
EVIL = "</script><img src=x onerror=\"window.pwned='yes'\">"


def palette(*, dark: bool = False) -> dict[str, str]:
    """The colours of the page's style sheet, by state."""
    light, _, rest = (ROOT / "dataplane/report/assets/page.css").read_text().partition("@media")
    return dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", rest if dark else light))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "shop.html"
    known = read_paths([ROOT / SHOP]).snapshot
    path.write_text(page_of(known, ["8080/TCP", "5432/TCP", "53/UDP"], EXTERNALS, [SHOP]))
    return path


def cell(source: str, destination: str) -> tuple[int, int]:
    return ORDER.index(source), ORDER.index(destination)


def select(browser: Browser, source: str, destination: str) -> None:
    """Click the cell of a pair: the filters bring it into view."""
    browser.search("from", source)
    browser.search("to", destination)
    browser.drawn("1x1")
    browser.point(0, 0, click=True)


def test_it_opens_from_a_file_and_asks_for_nothing(browser: Browser, shop: Path) -> None:
    browser.open(shop)
    assert browser.requests() == [shop.as_uri()]
    assert browser.errors() == []
    assert browser.text("h1") == "Who reaches whom"
    assert browser.text("#files") == SHOP
    facts = browser.text("#facts")
    for fact in ("40 pods", "5 namespaces", "10 policies", "2 addresses outside", "IPv4", "made by podgate"):
        assert fact in facts
    # 42 places: 42 · 41 pairs, less the two between addresses outside.
    allowed, denied = re.findall(r"8080/TCP: ([\d,]+) pairs allowed, ([\d,]+) denied", facts)[0]
    assert int(allowed.replace(",", "")) + int(denied.replace(",", "")) == 42 * 41 - 2


def test_nothing_but_its_own_script_may_run_or_fetch(browser: Browser, shop: Path) -> None:
    browser.open(shop)
    browser.run("""
        const script = document.createElement("script");
        script.textContent = "window.injected = true";
        document.body.append(script);
        window.fetched = null;
        const say = (word) => () => { window.fetched = word; };
        fetch("http://127.0.0.1:9/").then(say("yes"), say("no"));
    """)
    browser.until("return window.fetched !== null")
    assert browser.run("return [window.injected ?? null, window.fetched]") == [None, "no"]
    assert all("Content Security Policy" in error for error in browser.errors())


@pytest.mark.parametrize(
    ("port", "source", "destination", "state"),
    [
        ("8080/TCP", "storefront/web-0", "orders/api-3", "allowed"),
        ("8080/TCP", "storefront/web-0", "orders/db-1", "ingress"),
        ("8080/TCP", "payments/ledger-2", "storefront/web-5", "egress"),
        ("8080/TCP", "storefront/web-8", "payments/gateway-0", "both"),
        ("8080/TCP", "storefront/web-8", "storefront/web-8", "self"),
        ("8080/TCP", "203.0.113.9", "203.0.113.70", "unjudged"),
        ("8080/TCP", "payments/gateway-1", "203.0.113.9", "allowed"),
        ("8080/TCP", "payments/gateway-1", "203.0.113.70", "egress"),  # inside the except
        ("5432/TCP", "orders/worker-4", "orders/db-0", "allowed"),
        ("5432/TCP", "storefront/web-0", "orders/api-3", "ingress"),
        ("53/UDP", "payments/ledger-0", "kube-system/coredns-1", "allowed"),
        ("53/UDP", "payments/ledger-0", "monitoring/grafana-0", "egress"),
        ("all", "orders/worker-4", "orders/db-0", "partly"),
        ("all", "storefront/cache-0", "orders/db-0", "ingress"),
        ("all", "orders/api-0", "storefront/web-0", "allowed"),
    ],
)
def test_a_cell_has_the_colour_of_its_verdict(
    browser: Browser, shop: Path, port: str, source: str, destination: str, state: str
) -> None:
    if browser.driver.current_url != shop.as_uri():
        browser.open(shop)
    browser.choose_port(port)
    if browser.find("#fit").is_enabled():
        browser.find("#fit").click()
    assert browser.colour(*cell(source, destination)) == palette()[state]


def test_the_dark_scheme_has_colours_of_its_own(browser: Browser, shop: Path) -> None:
    browser.open(shop, dark=True)
    browser.find("#fit").click()
    browser.choose_port("8080/TCP")
    dark = palette(dark=True)
    for source, destination, state in (
        ("storefront/web-0", "orders/api-3", "allowed"),
        ("storefront/web-0", "orders/db-1", "ingress"),
        ("payments/ledger-2", "storefront/web-5", "egress"),
        ("storefront/web-8", "payments/gateway-0", "both"),
    ):
        assert browser.colour(*cell(source, destination)) == dark[state] != palette()[state]
    # The page turns with the system, while it is open.
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.until("return !matchMedia('(prefers-color-scheme: dark)').matches")
    assert browser.colour(*cell("storefront/web-0", "orders/api-3")) == palette()["allowed"]


def test_searching_by_label_name_and_port(browser: Browser, shop: Path) -> None:
    browser.open(shop)
    browser.search("from", "app=web")
    browser.drawn("9x42")
    assert "9 of 42 sources, 42 of 42 destinations" in browser.text("#shown")
    browser.search("to", "payments/ 5432/TCP")
    browser.drawn("9x9")
    assert browser.run("return document.getElementById('map').dataset.port") == "5432/TCP"
    assert "9 of 42 sources, 9 of 42 destinations · 0 pairs allowed · 81 denied" in browser.text("#shown")
    browser.find("#swap").click()
    assert browser.find("#from").get_attribute("value") == "payments/ 5432/TCP"
    browser.search("from", "ledger-3")
    browser.drawn("1x9")
    browser.search("from", "app=nothing")
    browser.drawn("empty")
    assert "From “app=nothing”" in browser.text("#empty")
    browser.find("#reset").click()
    browser.drawn("42x42")
    assert "all 42 sources and destinations" in browser.text("#shown")
    assert not browser.find("#reset").is_enabled()


def test_pointing_at_a_cell_names_the_pair(browser: Browser, shop: Path) -> None:
    browser.open(shop)
    browser.choose_port("8080/TCP")
    browser.search("from", "web-3")
    browser.search("to", "orders/db-2")
    browser.drawn("1x1")
    browser.point(0, 0)
    tip = "storefront/web-3 → orders/db-2, 8080/TCP: denied by the destination's ingress"
    browser.until("return document.getElementById('tip').textContent === arguments[0]", tip)


def test_a_click_says_why_it_is_denied(browser: Browser, shop: Path) -> None:
    browser.open(shop)
    browser.choose_port("8080/TCP")
    select(browser, "storefront/web-3", "orders/db-2")
    assert browser.text("#panel h2") == "storefront/web-3 → orders/db-2"
    egress, ingress = "#panel [data-end=egress]", "#panel [data-end=ingress]"
    assert browser.text(f"{egress} .word") == "allowed"
    assert browser.text(f"{egress} .by") == "storefront/out-to-services egress[0].to[0]"
    assert browser.text(f"{egress} .isolating") == "storefront/out-to-services"
    assert browser.text(f"{ingress} .word") == "denied"
    assert browser.text(f"{ingress} .isolating") == "orders/database, orders/default-deny"
    misses = browser.texts(f"{ingress} .rules > li")
    assert len(misses) == 2
    database = next(miss for miss in misses if miss.startswith("orders/database ingress[0].from[0]"))
    assert "storefront/web-3 is in namespace storefront" in database
    assert "port does not match" in database
    assert any(miss.startswith("orders/default-deny ingress") for miss in misses)


def test_a_click_says_why_both_ends_deny_and_why_an_except_does(browser: Browser, shop: Path) -> None:
    browser.open(shop)
    browser.choose_port("8080/TCP")
    select(browser, "storefront/web-0", "payments/gateway-2")
    assert browser.texts("#panel .end .word") == ["denied", "denied"]
    assert "namespace payments has label team=payments, not team=shop" in browser.text("[data-end=egress]")
    assert "storefront/web-0 has label app=web, not app=api" in browser.text("[data-end=ingress]")
    select(browser, "payments/gateway-2", "203.0.113.70")
    assert browser.texts("#panel .end .word") == ["denied", "allowed"]
    assert (
        "203.0.113.70 is inside 203.0.113.0/24, but also inside its except 203.0.113.64/26"
        in browser.text("[data-end=egress]")
    )


def test_the_overview_explains_every_port(browser: Browser, shop: Path) -> None:
    browser.open(shop)
    select(browser, "orders/worker-1", "orders/db-0")
    sections = browser.driver.find_elements("css selector", "#panel section")
    assert [section.get_attribute("data-port") for section in sections] == ["8080/TCP", "5432/TCP", "53/UDP"]
    heads = [section.text.splitlines()[:2] for section in sections]
    assert [" ".join(head).split(maxsplit=1)[1] for head in heads] == [
        "denied by the destination's ingress",
        "allowed",
        "denied by the destination's ingress",
    ]
    assert "wrong port: allows 5432/TCP, packet is 8080/TCP" in sections[0].text
    assert "wrong protocol: allows 5432/TCP, packet is 53/UDP" in sections[2].text
    # With a port chosen, the open panel follows.
    browser.choose_port("5432/TCP")
    assert [
        section.get_attribute("data-port")
        for section in browser.driver.find_elements("css selector", "#panel section")
    ] == ["5432/TCP"]


def test_the_command_it_shows_gives_the_same_answer(browser: Browser, shop: Path) -> None:
    browser.open(shop)
    browser.choose_port("8080/TCP")
    select(browser, "payments/gateway-2", "203.0.113.70")
    command = shlex.split(browser.text("#panel .command"))
    assert command[:3] == ["podgate", "explain", SHOP]
    podgate = [sys.executable, "-c", "from dataplane.cli import main; main()"]
    done = subprocess.run(
        [*podgate, *command[1:], "--expect", "deny"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "inside its except 203.0.113.64/26" in done.stdout
    browser.find("#panel .copy").click()
    browser.until("return document.querySelector('#panel .copy').textContent === 'Copied'")


def test_it_works_by_keyboard_alone(browser: Browser, shop: Path) -> None:
    browser.open(shop)
    browser.keys("/")
    browser.keys("web-0 8080/TCP")
    browser.drawn("1x42")
    browser.run("document.getElementById('map').focus()")
    here = "return document.getElementById('here').textContent"
    browser.keys(Keys.ARROW_RIGHT)
    assert browser.run(here).startswith("storefront/web-0 → kube-system/coredns-0, 8080/TCP")
    browser.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.run(here).startswith("storefront/web-0 → monitoring/grafana-0")
    browser.keys(Keys.END)
    assert browser.run(here).startswith("storefront/web-0 → 203.0.113.70")
    browser.keys(Keys.ENTER)
    assert browser.text("#panel h2") == "storefront/web-0 → 203.0.113.70"
    browser.keys(Keys.ESCAPE)
    assert not browser.find("#panel").is_displayed()
    assert browser.run("return document.activeElement.id") == "map"
    before = float(browser.run("return document.getElementById('map').dataset.cell"))
    browser.keys("-")
    browser.frame()
    assert float(browser.run("return document.getElementById('map').dataset.cell")) <= before
    browser.keys("+")
    browser.frame()
    assert float(browser.run("return document.getElementById('map').dataset.cell")) >= before


def hostile() -> Snapshot:
    """Names that no API server takes, but a file may hold."""
    pods = (
        Pod(
            Key("a", EVIL),
            ips=(b"\x0a\x00\x00\x01",),
            host_ips=(b"\xc0\x00\x02\x01",),
            labels={"app": EVIL, EVIL: "x"},
        ),
        Pod(Key("b", "x\u202egnp.exe"), ips=(b"\x0a\x00\x00\x02",), host_ips=(b"\xc0\x00\x02\x02",)),
        Pod(Key(EVIL, "$(touch x) 'y'"), ips=(b"\x0a\x00\x00\x03",), host_ips=(b"\xc0\x00\x02\x03",)),
    )
    policies = (
        NetworkPolicy(
            Key("a", EVIL),
            policy_types=frozenset(Direction),
            ingress=(
                NetworkPolicyRule(
                    (NetworkPolicyPeer(LabelSelector.of({"app": EVIL})),), (NetworkPolicyPort(6, EVIL),)
                ),
            ),
        ),
    )
    return Snapshot(
        pods=tuple(sorted(pods, key=lambda pod: pod.key)),
        network_policies=policies,
        namespaces=(Namespace("a", {"team": EVIL}),),
    )


def test_hostile_names_are_text(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "evil.html"
    text = page_of(hostile(), ["80/TCP"], [], [f"{EVIL}.yaml", "-x.yaml"])
    assert "<img" not in text
    path.write_text(text)
    browser.open(path)
    assert browser.driver.title == f"podgate matrix: {EVIL}.yaml, -x.yaml"
    assert EVIL in browser.text("#files")
    for row in range(3):
        for column in range(3):
            browser.point(row, column, click=True)
            browser.until("return document.querySelector('#panel h2') !== null")
    browser.search("from", "touch")
    browser.search("to", "gnp")
    browser.drawn("1x1")
    browser.point(0, 0, click=True)
    assert browser.text("#panel h2") == rf"{EVIL}/$(touch x) 'y' → b/x\u202egnp.exe"
    assert browser.run("return [window.pwned ?? null, document.images.length]") == [None, 0]
    assert browser.run("return document.scripts.length") == 1
    assert browser.errors() == []
    command = shlex.split(browser.text("#panel .command"))
    assert command[:4] == ["podgate", "explain", f"{EVIL}.yaml", "./-x.yaml"]


def large(pods: int) -> Snapshot:
    """Ten namespaces, ten applications in each; each namespace lets in one other and its own."""
    names = [f"team-{number}" for number in range(10)]

    def policy(number: int) -> NetworkPolicy:
        friend = LabelSelector.of({"kubernetes.io/metadata.name": names[(number + 1) % 10]})
        return NetworkPolicy(
            Key(names[number], "friends"),
            policy_types=frozenset({Direction.INGRESS}),
            ingress=(
                NetworkPolicyRule((NetworkPolicyPeer(None, friend),), (NetworkPolicyPort(6, 80),)),
                NetworkPolicyRule((NetworkPolicyPeer(LabelSelector()),)),
            ),
        )

    return Snapshot(
        pods=tuple(
            sorted(
                (
                    Pod(
                        Key(names[number % 10], f"app-{number // 10 % 10}-{number:04}"),
                        ips=((10 << 24 | number + 1).to_bytes(4),),
                        host_ips=(b"\xc0\x00\x02" + bytes([number % 50]),),
                        labels={"app": f"app-{number // 10 % 10}", "pod": str(number)},
                    )
                    for number in range(pods)
                ),
                key=lambda pod: pod.key,
            )
        ),
        network_policies=tuple(policy(number) for number in range(10)),
        namespaces=tuple(Namespace(name) for name in names),
    )


def test_a_thousand_pods_can_be_looked_at(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    path.write_text(page_of(large(1000), ["80/TCP", "53/UDP"], [], ["dump.yaml"]))
    assert path.stat().st_size < 2_000_000
    browser.open(path)
    assert browser.run("return document.body.dataset.drawn") == "1000x1000"
    # Everything at once: less than a pixel a cell, and blocks of a hundred pods by a hundred.
    assert float(browser.run("return document.getElementById('map').dataset.cell")) < 1
    colours = palette()
    browser.choose_port("80/TCP")
    assert browser.colour(50, 150) == colours["ingress"]  # team-1 lets in team-2, not team-0
    assert browser.colour(150, 50) == colours["allowed"]
    browser.choose_port("53/UDP")
    assert browser.colour(150, 50) == colours["ingress"]
    # Down to names and back: the point in the middle stays.
    for _ in range(9):
        browser.find("#in").click()
    browser.frame()
    assert float(browser.run("return document.getElementById('map').dataset.cell")) >= 16
    browser.run("const map = document.getElementById('map'); map.scrollLeft = 1e9; map.scrollTop = 1e9;")
    assert browser.colour(999, 999) == colours["self"]
    assert browser.colour(999, 998) == colours["allowed"]
    browser.point(999, 998, click=True)
    assert browser.text("#panel h2").startswith("team-9/app-9-0999 → team-9/app-9-0899")
    assert "team-9/friends ingress[1].from[0]" in browser.text("[data-end=ingress] .by")
    browser.find("#fit").click()
    browser.search("from", "app=app-3 team-4/")
    browser.drawn("10x1000")
    browser.search("to", "team-7/app-1-0017")
    browser.drawn("10x1")
    browser.point(0, 0, click=True)
    assert "namespace team-4 is not team-8" in browser.text("[data-end=ingress]")


def test_it_says_where_it_has_no_room_for_the_reason(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanations, "QUESTIONS", 0)
    path = tmp_path / "shop.html"
    path.write_text(page_of(read_paths([ROOT / SHOP]).snapshot, ["8080/TCP"], [], [SHOP]))
    browser.open(path)
    select(browser, "storefront/web-3", "orders/db-2")
    assert browser.text("#panel [data-end=ingress] .word") == "denied"
    assert browser.text("#panel [data-end=ingress] .isolating") == "orders/database, orders/default-deny"
    assert "the command below" in browser.text("#panel [data-end=ingress] .unexplained").lower()
    assert browser.text("#panel .command").startswith(f"podgate explain {SHOP} --from storefront/web-3")
    # Of what is allowed, at least the policy is named: the engine says that.
    assert browser.text("#panel [data-end=egress] .by") == "storefront/out-to-services"


def test_it_fits_a_narrow_window(browser: Browser, shop: Path) -> None:
    metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.open(shop)
        browser.choose_port("8080/TCP")
        select(browser, "storefront/web-3", "orders/db-2")
        panel, shown = browser.find("#panel").rect, browser.find("#map").rect
        # One below the other, and nothing beside the window.
        assert panel["y"] >= shown["y"] + shown["height"]
        assert panel["x"] + panel["width"] <= 400
        assert browser.run("return document.documentElement.scrollWidth") <= 400
        assert browser.text("#panel [data-end=ingress] .word") == "denied"
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
