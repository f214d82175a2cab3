# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, auto_pickle=False
"""Compiling rules to sorted intervals, and looking a peer up in them.

Theory of operation. Rules with equal ports form a *class*. Addresses are swept in ascending order;
at each address the lowest active rule of a class is the class's winner, and every stretch between
two changes of winner is a *piece* (rule, class, first interval, last interval). A cell holds the
pieces of one interval (or block of intervals), in ascending order of rule: its classes are merged
into disjoint port ranges where the earlier rule wins. Equal sequences of classes share one merged
range list ("structure"), equal (structure, rules) share one cell.

Cost: O(n log n) in rules plus excepts. A hundred wide rules over 100,000 narrow ones do not
multiply (see `family_t`), so nobody can write a small policy that compiles to a large table.
"""
cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, int32_t
from libc.stddef cimport size_t
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcpy, memset

from dataplane._memory cimport block_new
from dataplane._packet cimport addr_t, packed_address, unpack_address

from dataplane.model import Direction
from dataplane.reasons import Reason
from dataplane.verdict import Allowed, Interval

cdef extern from *:
    """
    #define rules_get_u64(slot) __atomic_load_n((slot), __ATOMIC_RELAXED)
    """
    uint64_t get_u64 "rules_get_u64" (const uint64_t *slot) noexcept nogil

cdef enum:
    NO = 0xFFFFFFFF
    EVERYTHING = 0xFFFFFF         # the last (protocol, port)
    BLOCK = 1 << LEVEL_BITS


# ---- growable arrays ---------------------------------------------------------------------------

cdef struct vec_t:
    char *data
    size_t n
    size_t cap
    size_t item                   # bytes per element


cdef inline void vec_init(vec_t *v, size_t item) noexcept nogil:
    v.data = NULL
    v.n = 0
    v.cap = 0
    v.item = item


# Room for `extra` more elements; their place, or NULL without memory.
cdef inline void *vec_grow(vec_t *v, size_t extra) noexcept nogil:
    cdef size_t cap
    cdef char *data
    if v.n + extra > v.cap:
        cap = 2 * v.cap + extra + 16
        data = <char *>realloc(v.data, cap * v.item)
        if data == NULL:
            return NULL
        v.data = data
        v.cap = cap
    v.n += extra
    return v.data + (v.n - extra) * v.item


# ---- what is compiled --------------------------------------------------------------------------

cdef struct edge_t:               # a rule begins or stops to match at this address
    addr_t at
    uint32_t rule
    uint32_t begins


cdef struct class_t:              # rules with equal ports
    uint32_t first_range          # class_ranges[first_range : first_range + n_ranges], sorted, disjoint
    uint32_t n_ranges
    uint32_t everything           # 1: every protocol and port
    uint32_t first_heap           # its part of the heap array
    uint32_t n_heap
    uint32_t winner               # NO: none
    uint32_t since                # interval from which the winner wins
    uint32_t touched
    uint32_t structure            # of the sequence that is this class alone, NO: not made yet


cdef struct piece_t:
    uint32_t rule
    uint32_t group                # index of its class
    uint32_t first                # interval
    uint32_t end                  # interval behind the last


cdef struct index_t:              # finds things by their hash, open addressing
    uint32_t *table               # numbers of things, NO: free
    size_t slots                  # a power of two, 0 at first
    vec_t hashes                  # uint64_t, of thing 0, 1, …


cdef struct structure_t:          # the merged ranges of one sequence of classes
    uint32_t first_class          # sequences[first_class : first_class + n_classes]
    uint32_t n_classes
    uint32_t first_range          # ranges[...]; slots count the picks
    uint32_t n_ranges
    uint32_t first_pick           # picks[...]: places in the sequence whose rules allow something
    uint32_t n_picks


cdef struct build_t:
    uint32_t n_rules
    uint32_t *rule_class
    uint8_t *active
    vec_t classes                 # class_t
    vec_t class_ranges            # port_range_t
    vec_t edges[2]                # edge_t, IPv4 and IPv6
    uint32_t *heap
    vec_t touched                 # uint32_t
    vec_t pieces                  # piece_t
    vec_t starts[2]               # addr_t: the lowest address of each interval
    vec_t leaves[8]               # uint32_t: cells per family and level
    uint32_t levels[2]
    vec_t structures              # structure_t
    vec_t sequences               # uint32_t
    vec_t picks                   # uint32_t
    vec_t ranges                  # port_range_t
    vec_t cells                   # cell_t
    vec_t cell_structure          # uint32_t, beside cells
    vec_t ids                     # uint32_t
    index_t structure_index
    index_t cell_index            # thing 0 is cell 1: cell 0, which allows nothing, is never looked for
    vec_t scratch[4]              # uint32_t


cdef inline class_t *group_at(build_t *b, uint32_t i) noexcept nogil:
    return &(<class_t *>b.classes.data)[i]


cdef void build_init(build_t *b) noexcept nogil:
    cdef int i
    memset(b, 0, sizeof(build_t))
    vec_init(&b.classes, sizeof(class_t))
    vec_init(&b.class_ranges, sizeof(port_range_t))
    vec_init(&b.touched, sizeof(uint32_t))
    vec_init(&b.pieces, sizeof(piece_t))
    for i in range(2):
        vec_init(&b.edges[i], sizeof(edge_t))
        vec_init(&b.starts[i], sizeof(addr_t))
    for i in range(8):
        vec_init(&b.leaves[i], sizeof(uint32_t))
    vec_init(&b.structures, sizeof(structure_t))
    vec_init(&b.sequences, sizeof(uint32_t))
    vec_init(&b.picks, sizeof(uint32_t))
    vec_init(&b.ranges, sizeof(port_range_t))
    vec_init(&b.cells, sizeof(cell_t))
    vec_init(&b.cell_structure, sizeof(uint32_t))
    vec_init(&b.ids, sizeof(uint32_t))
    vec_init(&b.structure_index.hashes, sizeof(uint64_t))
    vec_init(&b.cell_index.hashes, sizeof(uint64_t))
    for i in range(4):
        vec_init(&b.scratch[i], sizeof(uint32_t))


cdef void build_free(build_t *b) noexcept nogil:
    cdef int i
    free(b.rule_class)
    free(b.active)
    free(b.heap)
    free(b.structure_index.table)
    free(b.structure_index.hashes.data)
    free(b.cell_index.table)
    free(b.cell_index.hashes.data)
    free(b.classes.data)
    free(b.class_ranges.data)
    free(b.touched.data)
    free(b.pieces.data)
    for i in range(2):
        free(b.edges[i].data)
        free(b.starts[i].data)
    for i in range(8):
        free(b.leaves[i].data)
    free(b.structures.data)
    free(b.sequences.data)
    free(b.picks.data)
    free(b.ranges.data)
    free(b.cells.data)
    free(b.cell_structure.data)
    free(b.ids.data)
    for i in range(4):
        free(b.scratch[i].data)


# ---- the sweep ---------------------------------------------------------------------------------

cdef int by_address(const void *a, const void *b) noexcept nogil:
    cdef const addr_t *x = <const addr_t *>a
    cdef const addr_t *y = <const addr_t *>b
    if x.high != y.high:
        return 1 if x.high > y.high else -1
    return (x.low > y.low) - (x.low < y.low)


cdef int by_number(const void *a, const void *b) noexcept nogil:
    cdef uint32_t x = (<const uint32_t *>a)[0]
    cdef uint32_t y = (<const uint32_t *>b)[0]
    return (x > y) - (x < y)


cdef inline void heap_push(uint32_t *heap, uint32_t n, uint32_t value) noexcept nogil:
    cdef uint32_t at = n, up
    while at:
        up = (at - 1) >> 1
        if heap[up] <= value:
            break
        heap[at] = heap[up]
        at = up
    heap[at] = value


# Take the lowest of `n` values out; n - 1 remain.
cdef inline void heap_pop(uint32_t *heap, uint32_t n) noexcept nogil:
    cdef uint32_t last = heap[n - 1], at = 0, down
    n -= 1
    while True:
        down = 2 * at + 1
        if down >= n:
            break
        if down + 1 < n and heap[down + 1] < heap[down]:
            down += 1
        if heap[down] >= last:
            break
        heap[at] = heap[down]
        at = down
    heap[at] = last


cdef bint close_piece(build_t *b, uint32_t group, uint32_t end) noexcept nogil:
    cdef class_t *c = group_at(b, group)
    cdef piece_t *piece
    if c.winner != NO and c.since < end:
        piece = <piece_t *>vec_grow(&b.pieces, 1)
        if piece == NULL:
            return False
        piece.rule = c.winner
        piece.group = group
        piece.first = c.since
        piece.end = end
    return True


cdef bint sweep(build_t *b, int family) noexcept nogil:
    cdef vec_t *edges = &b.edges[family]
    cdef vec_t *starts = &b.starts[family]
    cdef edge_t *edge
    cdef size_t i, j, n = edges.n
    cdef uint32_t group, winner, interval, at = 0
    cdef class_t *c
    cdef addr_t here
    cdef addr_t *start
    start = <addr_t *>vec_grow(starts, 1)
    if start == NULL:
        return False
    start.high = 0
    start.low = 0
    if n:  # without any, data is NULL, which C does not allow here
        qsort(edges.data, n, sizeof(edge_t), by_address)
    # Every class gets as much of the heap array as it has beginnings.
    for i in range(b.classes.n):
        c = group_at(b, <uint32_t>i)
        c.n_heap = 0
        c.winner = NO
        c.touched = 0
    edge = <edge_t *>edges.data
    for i in range(n):
        if edge[i].begins:
            group_at(b, b.rule_class[edge[i].rule]).n_heap += 1
    for i in range(b.classes.n):
        c = group_at(b, <uint32_t>i)
        c.first_heap = at
        at += c.n_heap
        c.n_heap = 0
    memset(b.active, 0, b.n_rules)

    i = 0
    while i < n:
        here = edge[i].at
        b.touched.n = 0
        while i < n and edge[i].at.high == here.high and edge[i].at.low == here.low:
            group = b.rule_class[edge[i].rule]
            c = group_at(b, group)
            if edge[i].begins:
                b.active[edge[i].rule] = 1
                heap_push(b.heap + c.first_heap, c.n_heap, edge[i].rule)
                c.n_heap += 1
            else:
                b.active[edge[i].rule] = 0
            if not c.touched:
                c.touched = 1
                if vec_grow(&b.touched, 1) == NULL:
                    return False
                (<uint32_t *>b.touched.data)[b.touched.n - 1] = group
            i += 1
        interval = NO
        for j in range(b.touched.n):
            group = (<uint32_t *>b.touched.data)[j]
            c = group_at(b, group)
            c.touched = 0
            while c.n_heap and not b.active[b.heap[c.first_heap]]:
                heap_pop(b.heap + c.first_heap, c.n_heap)
                c.n_heap -= 1
            winner = b.heap[c.first_heap] if c.n_heap else <uint32_t>NO
            if winner == c.winner:
                continue
            if interval == NO:
                if here.high or here.low:
                    start = <addr_t *>vec_grow(starts, 1)
                    if start == NULL:
                        return False
                    start[0] = here
                interval = <uint32_t>(starts.n - 1)
            if not close_piece(b, group, interval):
                return False
            c.winner = winner
            c.since = interval
    for i in range(b.classes.n):
        if not close_piece(b, <uint32_t>i, <uint32_t>starts.n):
            return False
    return True


# ---- cells -------------------------------------------------------------------------------------

cdef inline uint64_t mix(uint64_t h, uint64_t value) noexcept nogil:
    h = (h ^ value) * <uint64_t>0x9E3779B97F4A7C15
    return h ^ (h >> 29)


# The index of `value` among `n` sorted numbers that hold it.
cdef inline uint32_t place_of(const uint32_t *sorted_numbers, uint32_t n, uint32_t value) noexcept nogil:
    cdef uint32_t low = 0, high = n, middle
    while low + 1 < high:
        middle = (low + high) >> 1
        if sorted_numbers[middle] <= value:
            low = middle
        else:
            high = middle
    return low


cdef inline uint32_t unpainted(uint32_t *next_free, uint32_t at) noexcept nogil:
    cdef uint32_t root = at, up
    while next_free[root] != root:
        root = next_free[root]
    while next_free[at] != root:
        up = next_free[at]
        next_free[at] = root
        at = up
    return root


# Merge the ports of `n` classes, the earlier winning, into s.
cdef bint merge_ports(build_t *b, const uint32_t *groups, uint32_t n, structure_t *s) noexcept nogil:
    cdef vec_t *points = &b.scratch[0]
    cdef uint32_t *place
    cdef uint32_t *owner
    cdef uint32_t *next_free
    cdef uint32_t i, j, k, count, at, end, slot
    cdef class_t *c
    cdef port_range_t *r
    cdef port_range_t *out
    points.n = 0
    for i in range(n):
        c = group_at(b, groups[i])
        for j in range(c.n_ranges):
            r = &(<port_range_t *>b.class_ranges.data)[c.first_range + j]
            place = <uint32_t *>vec_grow(points, 2)
            if place == NULL:
                return False
            place[0] = r.first
            place[1] = r.last + 1
    place = <uint32_t *>points.data
    qsort(place, points.n, sizeof(uint32_t), by_number)
    count = 0
    for i in range(<uint32_t>points.n):
        if i == 0 or place[i] != place[count - 1]:
            place[count] = place[i]
            count += 1
    b.scratch[1].n = 0
    b.scratch[2].n = 0
    b.scratch[3].n = 0
    owner = <uint32_t *>vec_grow(&b.scratch[1], count)
    next_free = <uint32_t *>vec_grow(&b.scratch[2], count)
    if owner == NULL or next_free == NULL or vec_grow(&b.scratch[3], n) == NULL:
        return False
    for i in range(count):
        owner[i] = NO
        next_free[i] = i
    for i in range(n):
        c = group_at(b, groups[i])
        for j in range(c.n_ranges):
            r = &(<port_range_t *>b.class_ranges.data)[c.first_range + j]
            end = place_of(place, count, r.last + 1)
            at = unpainted(next_free, place_of(place, count, r.first))
            while at < end:
                owner[at] = i
                next_free[at] = at + 1
                at = unpainted(next_free, at + 1)
    # Slots number the owners that are left, in their order.
    next_free = <uint32_t *>b.scratch[3].data
    for i in range(n):
        next_free[i] = NO
    for i in range(count):
        if owner[i] != NO:
            next_free[owner[i]] = 0
    slot = 0
    s.first_pick = <uint32_t>b.picks.n
    for i in range(n):
        if next_free[i] != NO:
            next_free[i] = slot
            slot += 1
            if vec_grow(&b.picks, 1) == NULL:
                return False
            (<uint32_t *>b.picks.data)[b.picks.n - 1] = i
    s.n_picks = slot
    s.first_range = <uint32_t>b.ranges.n
    out = NULL
    for i in range(count):
        if owner[i] == NO:
            continue
        k = next_free[owner[i]]
        if out != NULL and out.last + 1 == place[i] and out.slot == k:
            out.last = place[i + 1] - 1
            continue
        out = <port_range_t *>vec_grow(&b.ranges, 1)
        if out == NULL:
            return False
        out.first = place[i]
        out.last = place[i + 1] - 1
        out.slot = k
    s.n_ranges = <uint32_t>b.ranges.n - s.first_range
    return True


# Room for one more thing; False without memory.
cdef bint index_room(index_t *index) noexcept nogil:
    cdef size_t slots = index.slots * 2 if index.slots else 256
    cdef const uint64_t *hashes = <const uint64_t *>index.hashes.data
    cdef uint32_t *table
    cdef size_t i, at
    if 2 * (index.hashes.n + 1) <= index.slots:
        return True
    table = <uint32_t *>malloc(slots * sizeof(uint32_t))
    if table == NULL:
        return False
    memset(table, 0xFF, slots * sizeof(uint32_t))
    for i in range(index.hashes.n):
        at = hashes[i] & (slots - 1)
        while table[at] != NO:
            at = (at + 1) & (slots - 1)
        table[at] = <uint32_t>i
    free(index.table)
    index.table = table
    index.slots = slots
    return True


# The next thing with this hash from slot `at` on, which moves along; NO at a free slot.
cdef inline uint32_t index_next(const index_t *index, uint64_t hash_, size_t *at) noexcept nogil:
    cdef uint32_t found
    at[0] &= index.slots - 1
    while True:
        found = index.table[at[0]]
        if found == NO or (<const uint64_t *>index.hashes.data)[found] == hash_:
            return found
        at[0] = (at[0] + 1) & (index.slots - 1)


# Give the free slot `at` to the next thing; False without memory.
cdef inline bint index_put(index_t *index, uint64_t hash_, size_t at) noexcept nogil:
    cdef uint64_t *hashes = <uint64_t *>vec_grow(&index.hashes, 1)
    if hashes == NULL:
        return False
    hashes[0] = hash_
    index.table[at] = <uint32_t>(index.hashes.n - 1)
    return True


# The structure of a sequence of classes; NO without memory.
cdef uint32_t structure_of(build_t *b, const uint32_t *groups, uint32_t n) noexcept nogil:
    cdef uint64_t h = n
    cdef size_t at
    cdef uint32_t i, found
    cdef structure_t *s
    cdef uint32_t *sequence
    if n == 1 and group_at(b, groups[0]).structure != NO:
        return group_at(b, groups[0]).structure
    for i in range(n):
        h = mix(h, groups[i])
    if not index_room(&b.structure_index):
        return NO
    at = h
    while True:
        found = index_next(&b.structure_index, h, &at)
        if found == NO:
            break
        s = &(<structure_t *>b.structures.data)[found]
        if s.n_classes == n:
            sequence = <uint32_t *>b.sequences.data + s.first_class
            for i in range(n):
                if sequence[i] != groups[i]:
                    break
            else:
                return found
        at += 1
    found = <uint32_t>b.structures.n
    s = <structure_t *>vec_grow(&b.structures, 1)
    if s == NULL:
        return NO
    s.first_class = <uint32_t>b.sequences.n
    s.n_classes = n
    sequence = <uint32_t *>vec_grow(&b.sequences, n)
    if sequence == NULL:
        return NO
    memcpy(sequence, groups, n * sizeof(uint32_t))
    if not merge_ports(b, groups, n, s) or not index_put(&b.structure_index, h, at):
        return NO
    if n == 1:
        group_at(b, groups[0]).structure = found
    return found


cdef inline const uint32_t *ids_of(build_t *b, const cell_t *cell) noexcept nogil:
    return &cell.first_rule_id if cell.n_ranges == 1 else <uint32_t *>b.ids.data + cell.first_rule_id


cdef inline uint64_t cell_hash(uint32_t structure, const uint32_t *ids, uint32_t n) noexcept nogil:
    cdef uint64_t h = structure
    cdef uint32_t i
    for i in range(n):
        h = mix(h, ids[i])
    return h


# The cell for pieces (rules[i], groups[i]), ascending in rule. NO without memory. Both arrays are used up.
cdef uint32_t cell_of(build_t *b, uint32_t *rules, uint32_t *groups, uint32_t n) noexcept nogil:
    cdef uint32_t i, structure, found
    cdef structure_t *s
    cdef cell_t *cell
    cdef uint64_t h
    cdef size_t at
    cdef uint32_t *ids
    cdef const uint32_t *known
    if n == 0:
        return 0
    for i in range(n):
        if group_at(b, groups[i]).everything:
            n = i + 1             # no later rule has anything left to allow
            break
    structure = structure_of(b, groups, n)
    if structure == NO:
        return NO
    s = &(<structure_t *>b.structures.data)[structure]
    for i in range(s.n_picks):
        rules[i] = rules[(<uint32_t *>b.picks.data)[s.first_pick + i]]
    if not index_room(&b.cell_index):
        return NO
    h = cell_hash(structure, rules, s.n_picks)
    at = h
    while True:
        found = index_next(&b.cell_index, h, &at)
        if found == NO:
            break
        found += 1
        if (<uint32_t *>b.cell_structure.data)[found] == structure:
            known = ids_of(b, &(<cell_t *>b.cells.data)[found])
            for i in range(s.n_picks):
                if known[i] != rules[i]:
                    break
            else:
                return found
        at += 1
    found = <uint32_t>b.cells.n
    cell = <cell_t *>vec_grow(&b.cells, 1)
    if cell == NULL or vec_grow(&b.cell_structure, 1) == NULL:
        return NO
    (<uint32_t *>b.cell_structure.data)[found] = structure
    cell.first_range = s.first_range
    cell.n_ranges = s.n_ranges
    if s.n_ranges == 1:
        cell.first_rule_id = rules[0]
    else:
        cell.first_rule_id = <uint32_t>b.ids.n
        ids = <uint32_t *>vec_grow(&b.ids, s.n_picks)
        if ids == NULL:
            return NO
        memcpy(ids, rules, s.n_picks * sizeof(uint32_t))
    return found if index_put(&b.cell_index, h, at) else NO


# Call for every (level, block) that a piece stands in: counts it, or writes it to its place.
cdef void place(const piece_t *piece, uint32_t levels, const uint32_t *sizes, uint32_t **offsets,
                uint32_t *rules, uint32_t *groups) noexcept nogil:
    cdef uint32_t first = piece.first, end = piece.end, level = 0, i, up_first, up_end
    while first < end:
        up_first = (first + BLOCK - 1) >> LEVEL_BITS
        # The last block counts as whole when the piece reaches the family's end.
        up_end = sizes[level + 1] if level + 1 < levels and end == sizes[level] else end >> LEVEL_BITS
        if level + 1 == levels or up_first >= up_end:
            up_first = end        # nothing to hand up
            up_end = 0
            i = first
            while i < end:
                if rules == NULL:
                    offsets[level][i] += 1
                else:
                    rules[offsets[level][i]] = piece.rule
                    groups[offsets[level][i]] = piece.group
                    offsets[level][i] += 1
                i += 1
            return
        i = first
        while i < end:
            if i == up_first << LEVEL_BITS and up_end:
                i = up_end << LEVEL_BITS
                continue
            if rules == NULL:
                offsets[level][i] += 1
            else:
                rules[offsets[level][i]] = piece.rule
                groups[offsets[level][i]] = piece.group
                offsets[level][i] += 1
            i += 1
        first = up_first
        end = up_end
        level += 1


cdef bint make_cells(build_t *b, int family) noexcept nogil:
    cdef uint32_t sizes[MAX_LEVELS + 1]
    cdef uint32_t *offsets[MAX_LEVELS]
    cdef uint32_t n = <uint32_t>b.starts[family].n
    cdef uint32_t n_pieces = <uint32_t>b.pieces.n
    cdef piece_t *pieces = <piece_t *>b.pieces.data
    cdef uint32_t *order = NULL
    cdef uint32_t *first_of = NULL
    cdef uint32_t *counts = NULL
    cdef uint32_t *rules = NULL
    cdef uint32_t *groups = NULL
    cdef uint32_t i, level, levels = 1, at, start, cell
    cdef uint64_t spread = 0, total = 0, stand = 0
    cdef uint32_t *leaves
    cdef bint done = False
    for i in range(n_pieces):
        spread += pieces[i].end - pieces[i].first
    sizes[0] = n
    if spread > 8 * <uint64_t>n_pieces + 4096:
        while levels < MAX_LEVELS and sizes[levels - 1] > BLOCK:
            sizes[levels] = (sizes[levels - 1] + BLOCK - 1) >> LEVEL_BITS
            levels += 1
    for level in range(levels):
        total += sizes[level]
    # Pieces in ascending order of rule, so that each cell's are.
    order = <uint32_t *>malloc((n_pieces + 1) * sizeof(uint32_t))
    first_of = <uint32_t *>calloc(b.n_rules + 2, sizeof(uint32_t))
    counts = <uint32_t *>calloc(total + 1, sizeof(uint32_t))
    if order != NULL and first_of != NULL and counts != NULL:
        for i in range(n_pieces):
            first_of[pieces[i].rule + 1] += 1
        for i in range(b.n_rules):
            first_of[i + 1] += first_of[i]
        for i in range(n_pieces):
            order[first_of[pieces[i].rule]] = i
            first_of[pieces[i].rule] += 1
        at = 0
        for level in range(levels):
            offsets[level] = counts + at
            at += sizes[level]
        for i in range(n_pieces):
            place(&pieces[i], levels, sizes, offsets, NULL, NULL)
        for i in range(<uint32_t>total):
            at = counts[i]
            counts[i] = <uint32_t>stand
            stand += at
        if stand < NO:
            rules = <uint32_t *>malloc((stand + 1) * sizeof(uint32_t))
            groups = <uint32_t *>malloc((stand + 1) * sizeof(uint32_t))
    if rules != NULL and groups != NULL:
        for i in range(n_pieces):
            place(&pieces[order[i]], levels, sizes, offsets, rules, groups)
        # Each count now is the end of its cell's pieces, hence the start of the next one's.
        done = True
        start = 0
        for level in range(levels):
            leaves = <uint32_t *>vec_grow(&b.leaves[family * MAX_LEVELS + level], sizes[level])
            if leaves == NULL:
                done = False
                break
            for i in range(sizes[level]):
                at = offsets[level][i]
                cell = cell_of(b, rules + start, groups + start, at - start)
                if cell == NO:
                    done = False
                    break
                leaves[i] = cell
                start = at
            if not done:
                break
    b.levels[family] = levels
    free(order)
    free(first_of)
    free(counts)
    free(rules)
    free(groups)
    return done


# Neighbouring intervals that allow the same become one. Only without upper levels, whose blocks
# count intervals.
cdef void merge_intervals(build_t *b, int family) noexcept nogil:
    cdef uint32_t *leaves = <uint32_t *>b.leaves[family * MAX_LEVELS].data
    cdef addr_t *starts = <addr_t *>b.starts[family].data
    cdef size_t i, kept = 0
    if b.levels[family] != 1:
        return
    for i in range(b.starts[family].n):
        if i and leaves[i] == leaves[kept - 1]:
            continue
        leaves[kept] = leaves[i]
        starts[kept] = starts[i]
        kept += 1
    b.starts[family].n = kept
    b.leaves[family * MAX_LEVELS].n = kept


cdef bint build(build_t *b) noexcept nogil:
    cdef int family
    cdef size_t beginnings = b.edges[0].n if b.edges[0].n > b.edges[1].n else b.edges[1].n
    cdef cell_t *nothing
    b.heap = <uint32_t *>malloc((beginnings + 1) * sizeof(uint32_t))
    b.active = <uint8_t *>malloc(b.n_rules + 1)
    nothing = <cell_t *>vec_grow(&b.cells, 1)
    if b.heap == NULL or b.active == NULL or nothing == NULL or vec_grow(&b.cell_structure, 1) == NULL:
        return False
    memset(nothing, 0, sizeof(cell_t))
    (<uint32_t *>b.cell_structure.data)[0] = NO
    for family in range(2):
        b.pieces.n = 0
        if not sweep(b, family) or not make_cells(b, family):
            return False
        merge_intervals(b, family)
    return True


# ---- from Python rules -------------------------------------------------------------------------

cdef inline addr_t last_address(const addr_t *first, uint32_t bits, uint32_t length) noexcept nogil:
    cdef addr_t last = first[0]
    cdef uint32_t host = bits - length
    if host >= 64:
        last.low = ~<uint64_t>0
        if host > 64:
            last.high |= ~<uint64_t>0 >> (128 - host)
    elif host:
        last.low |= (<uint64_t>1 << host) - 1
    return last


cdef inline bint below(const addr_t *a, const addr_t *b) noexcept nogil:
    return a.high < b.high or (a.high == b.high and a.low < b.low)


cdef inline addr_t successor(const addr_t *a) noexcept nogil:
    cdef addr_t up = a[0]
    up.low += 1
    if up.low == 0:
        up.high += 1
    return up


cdef bint read_prefix(object prefix, addr_t *first, addr_t *last, int *family) except False:
    cdef bytes network = prefix[0]
    cdef Py_ssize_t length = prefix[1]
    cdef Py_ssize_t bits = 8 * len(network)
    cdef addr_t zero, mask
    zero.high = 0
    zero.low = 0
    unpack_address(network, first)
    if not 0 <= length <= bits:
        raise ValueError(f"{prefix!r} is not a prefix: its length must be 0 to {bits}")
    family[0] = 0 if bits == 32 else 1
    last[0] = last_address(first, <uint32_t>bits, <uint32_t>length)
    mask = last_address(&zero, <uint32_t>bits, <uint32_t>length)
    if first.high & mask.high or first.low & mask.low:
        raise ValueError(f"{prefix!r} is not a prefix: bits are set behind its length")
    return True


cdef bint add_edge(build_t *b, int family, const addr_t *at, uint32_t rule, uint32_t begins) except False:
    cdef edge_t *edge = <edge_t *>vec_grow(&b.edges[family], 1)
    if edge == NULL:
        raise MemoryError
    edge.at = at[0]
    edge.rule = rule
    edge.begins = begins
    return True


cdef bint add_stretch(build_t *b, int family, const addr_t *first, const addr_t *last,
                      uint32_t rule) except False:
    cdef addr_t behind
    add_edge(b, family, first, rule, 1)
    behind = successor(last)
    if (behind.low >> 32 == 0) if family == 0 else (behind.high or behind.low):
        add_edge(b, family, &behind, rule, 0)
    return True


# The stretches of addresses that a rule matches: its prefix without its excepts.
cdef bint add_rule(build_t *b, object prefix, object excepts, uint32_t rule) except False:
    cdef addr_t first, last, hole_first, hole_last
    cdef int family, hole_family
    cdef addr_t before
    cdef bint over = False
    read_prefix(prefix, &first, &last, &family)
    if not excepts:
        return add_stretch(b, family, &first, &last, rule)
    holes = []
    for hole in excepts:
        read_prefix(hole, &hole_first, &hole_last, &hole_family)
        if hole_family == family:
            holes.append(hole)
    holes.sort()                  # by network; prefixes nest or are disjoint
    for hole in holes:
        read_prefix(hole, &hole_first, &hole_last, &hole_family)
        if below(&hole_last, &first):
            continue              # before what is left, or inside the hole before
        if below(&last, &hole_first):
            break
        if below(&first, &hole_first):
            before = hole_first
            if before.low == 0:
                before.high -= 1
            before.low -= 1
            add_stretch(b, family, &first, &before, rule)
        if not below(&hole_last, &last):
            over = True
            break
        first = successor(&hole_last)
    if not over:
        add_stretch(b, family, &first, &last, rule)
    return True


cdef uint32_t add_class(build_t *b, object ports) except? 0xFFFFFFFF:
    cdef class_t *c = <class_t *>vec_grow(&b.classes, 1)
    cdef port_range_t *r
    cdef uint32_t first, last
    if c == NULL:
        raise MemoryError
    memset(c, 0, sizeof(class_t))
    c.structure = NO
    c.first_range = <uint32_t>b.class_ranges.n
    for first, last in ports:
        r = <port_range_t *>vec_grow(&b.class_ranges, 1)
        if r == NULL:
            raise MemoryError
        r.first = first
        r.last = last
        r.slot = 0
    c.n_ranges = <uint32_t>b.class_ranges.n - c.first_range
    c.everything = len(ports) == 1 and ports[0] == (0, EVERYTHING)
    return <uint32_t>(b.classes.n - 1)


# (first, last) numbers, sorted, disjoint, not adjacent: equal for equal meaning.
@cython.wraparound(True)
cdef tuple normal_ports(object ports):
    cdef list merged = []
    if not ports:
        return ((0, EVERYTHING),)
    for protocol, first, last in sorted(ports):
        if not (0 <= protocol <= 255 and 0 <= first <= last <= 65535):
            raise ValueError(
                f"{(protocol, first, last)!r} is not a port range: protocol 0-255, ports 0-65535")
        low, high = protocol << 16 | first, protocol << 16 | last
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


cdef bint read_rules(build_t *b, tuple rules) except False:
    cdef dict by_ports = {}
    cdef dict by_meaning = {}
    cdef uint32_t i = 0
    b.n_rules = <uint32_t>len(rules)
    b.rule_class = <uint32_t *>malloc((b.n_rules + 1) * sizeof(uint32_t))
    if b.rule_class == NULL:
        raise MemoryError
    for rule in rules:
        ports = rule.ports
        group = by_ports.get(ports)
        if group is None:
            meaning = normal_ports(ports)
            group = by_meaning.get(meaning)
            if group is None:
                group = by_meaning[meaning] = add_class(b, meaning)
            by_ports[ports] = group
        b.rule_class[i] = group
        add_rule(b, rule.cidr, rule.excepts, i)
        i += 1
    return True


# ---- lookup ------------------------------------------------------------------------------------

# The last of `n` sorted starts that is not above the value. Without branches that depend on the
# data, several searches overlap in the processor: measured, a B-tree of cache lines is slower.
cdef inline uint32_t last_start4(const uint32_t *starts, uint32_t n, uint32_t value) noexcept nogil:
    cdef const uint32_t *base = starts
    cdef uint32_t half
    while n > 1:
        half = n >> 1
        base += half if base[half] <= value else 0
        n -= half
    return <uint32_t>(base - starts)


cdef inline uint32_t last_start6(const addr_t *starts, uint32_t n, const addr_t *value) noexcept nogil:
    cdef const addr_t *base = starts
    cdef uint32_t half
    while n > 1:
        half = n >> 1
        base += half if not below(value, &base[half]) else 0
        n -= half
    return <uint32_t>(base - starts)


# What fills up the last stride counts for the highest address only: hence the cap.
cdef inline uint32_t interval4(const family_t *f, uint32_t value) noexcept nogil:
    cdef uint32_t at = STRIDE * last_start4(f.tops4, f.n_tops, value)
    at += last_start4(f.starts4 + at, STRIDE, value)
    return at if at < f.n else f.n - 1


cdef inline uint32_t interval6(const family_t *f, const addr_t *value) noexcept nogil:
    cdef uint32_t at = STRIDE * last_start6(f.tops6, f.n_tops, value)
    at += last_start6(f.starts6 + at, STRIDE, value)
    return at if at < f.n else f.n - 1


cdef inline uint32_t rule_at(const ruleset_t *rules, const cell_t *cell, uint32_t slot) noexcept nogil:
    return cell.first_rule_id if cell.n_ranges == 1 else rules.rule_ids[cell.first_rule_id + slot]


cdef int32_t ruleset_find(const ruleset_t *rules, uint8_t family, const addr_t *peer,
                          uint8_t protocol, uint16_t port) noexcept nogil:
    cdef const family_t *f
    cdef const cell_t *cell
    cdef const port_range_t *r
    cdef uint32_t number = <uint32_t>protocol << 16 | port
    cdef uint32_t i, n, half, level, rule, best = NO
    if family == 4:
        f = &rules.v4
        i = interval4(f, <uint32_t>peer.low)
    else:
        f = &rules.v6
        i = interval6(f, peer)
    for level in range(f.levels):
        cell = &rules.cells[f.cells[level][i]]
        i >>= LEVEL_BITS
        n = cell.n_ranges
        if n == 0:
            continue
        r = rules.ranges + cell.first_range
        while n > 1:
            half = n >> 1
            r += half if r[half].first <= number else 0
            n -= half
        if r.first <= number <= r.last:
            rule = rule_at(rules, cell, r.slot)
            if rule < best:
                best = rule
    return <int32_t>best


# ---- RuleSet -----------------------------------------------------------------------------------

cdef inline size_t padded(size_t size) noexcept nogil:
    return (size + 63) & ~<size_t>63


cdef char *copy_vec(char *to, const vec_t *v) noexcept nogil:
    if v.n:
        memcpy(to, v.data, v.n * v.item)
    return to + padded(v.n * v.item)


cdef inline size_t strides(size_t n) noexcept nogil:
    return (n + STRIDE - 1) // STRIDE


cdef char *write_starts4(char *at, family_t *f, const vec_t *starts) noexcept nogil:
    cdef const addr_t *from_ = <const addr_t *>starts.data
    cdef size_t i, n = starts.n
    cdef uint32_t *numbers = <uint32_t *>at
    cdef uint32_t *tops = numbers + STRIDE * strides(n)
    for i in range(STRIDE * strides(n)):
        numbers[i] = <uint32_t>from_[i].low if i < n else <uint32_t>NO
        if i % STRIDE == 0:
            tops[i // STRIDE] = numbers[i]
    f.n = <uint32_t>n
    f.n_tops = <uint32_t>strides(n)
    f.starts4 = numbers
    f.tops4 = tops
    return at + padded((STRIDE + 1) * strides(n) * sizeof(uint32_t))


cdef char *write_starts6(char *at, family_t *f, const vec_t *starts) noexcept nogil:
    cdef size_t i, n = starts.n
    cdef addr_t *addresses = <addr_t *>at
    cdef addr_t *tops = addresses + STRIDE * strides(n)
    memset(at, 0xFF, STRIDE * strides(n) * sizeof(addr_t))
    memcpy(at, starts.data, n * sizeof(addr_t))
    for i in range(strides(n)):
        tops[i] = addresses[STRIDE * i]
    f.n = <uint32_t>n
    f.n_tops = <uint32_t>strides(n)
    f.starts6 = addresses
    f.tops6 = tops
    return at + padded((STRIDE + 1) * strides(n) * sizeof(addr_t))


# Copy what was built into the one block of a RuleSet.
cdef bint take(RuleSet self, build_t *b) noexcept nogil:
    cdef size_t size = 64
    cdef char *at
    cdef int level
    size += padded((STRIDE + 1) * strides(b.starts[0].n) * sizeof(uint32_t))
    size += padded((STRIDE + 1) * strides(b.starts[1].n) * sizeof(addr_t))
    for level in range(2 * MAX_LEVELS):
        size += padded(b.leaves[level].n * sizeof(uint32_t))
    size += padded(b.cells.n * sizeof(cell_t)) + padded(b.ranges.n * sizeof(port_range_t))
    size += padded(b.ids.n * sizeof(uint32_t))
    self.block = block_new(size)
    if self.block == NULL:
        return False
    self.nbytes = <Py_ssize_t>size
    at = <char *>((<size_t>self.block + 63) & ~<size_t>63)
    at = write_starts4(at, &self.c.v4, &b.starts[0])
    at = write_starts6(at, &self.c.v6, &b.starts[1])
    self.c.v4.levels = b.levels[0]
    self.c.v6.levels = b.levels[1]
    for level in range(MAX_LEVELS):
        self.c.v4.cells[level] = <uint32_t *>at
        at = copy_vec(at, &b.leaves[level])
    for level in range(MAX_LEVELS):
        self.c.v6.cells[level] = <uint32_t *>at
        at = copy_vec(at, &b.leaves[MAX_LEVELS + level])
    self.c.cells = <cell_t *>at
    at = copy_vec(at, &b.cells)
    self.c.ranges = <port_range_t *>at
    at = copy_vec(at, &b.ranges)
    self.c.rule_ids = <uint32_t *>at
    copy_vec(at, &b.ids)
    return True


cdef addr_t start_of(RuleSet self, int family, uint32_t i) noexcept:
    cdef addr_t address
    if family == 6:
        return self.c.v6.starts6[i]
    address.high = 0
    address.low = self.c.v4.starts4[i]
    return address


@cython.final
cdef class RuleSet:
    """What one direction of one pod allows, compiled. Immutable.

    `rules` is a sequence of `dataplane.model.Rule`; a rule's id is its place in it. `tag` is kept
    for the caller. ValueError for a rule that is not well-formed.
    """

    def __cinit__(self, rules, tag=None):
        cdef build_t b
        cdef bint done
        self.rules = tuple(rules)
        self.tag = tag
        build_init(&b)
        try:
            read_rules(&b, self.rules)
            with nogil:
                done = build(&b) and take(self, &b)
            if not done:
                raise MemoryError
        finally:
            build_free(&b)

    def __dealloc__(self):
        free(self.block)

    def find(self, bytes peer not None, protocol, port):
        """The lowest rule id that allows `peer` at (protocol, port), or -1.

        A protocol without ports has port 0.
        """
        cdef addr_t address
        unpack_address(peer, &address)
        return ruleset_find(&self.c, 4 if len(peer) == 4 else 6, &address, protocol, port)

    @cython.wraparound(True)
    def intervals(self, family):
        """The address intervals that allow anything, ascending: a list of `Interval`.

        `family` is 4 or 6. Neighbours that allow the same are one.
        """
        cdef const family_t *f
        cdef const cell_t *cell
        cdef const port_range_t *r
        cdef addr_t begin, last
        cdef uint32_t i, j, level
        if family not in (4, 6):
            raise ValueError(f"family is {family!r}, must be 4 or 6")
        f = &self.c.v4 if family == 4 else &self.c.v6
        found = []
        for i in range(f.n):
            pieces = []
            for level in range(f.levels):
                cell = &self.c.cells[f.cells[level][i >> (LEVEL_BITS * level)]]
                for j in range(cell.n_ranges):
                    r = &self.c.ranges[cell.first_range + j]
                    pieces.append((rule_at(&self.c, cell, r.slot), r.first, r.last))
            allowed = paint(pieces) if f.levels > 1 else [Allowed(a, z, rule) for rule, a, z in pieces]
            if i + 1 == f.n:
                last.high = ~<uint64_t>0
                last.low = <uint64_t>0xFFFFFFFF if family == 4 else ~<uint64_t>0
            else:
                last = start_of(self, family, i + 1)
                if last.low == 0:
                    last.high -= 1
                last.low -= 1
            if found and found[-1][2] == allowed:
                found[-1][1] = packed_address(&last, family)
            else:
                begin = start_of(self, family, i)
                found.append([packed_address(&begin, family), packed_address(&last, family), allowed])
        return [Interval(first, end, tuple(what)) for first, end, what in found if what]

    @property
    def n_intervals(self):
        """Address intervals of both families that a look-up searches."""
        return self.c.v4.n + self.c.v6.n

    def __repr__(self):
        return f"<RuleSet of {len(self.rules)} rules, {self.c.v4.n} + {self.c.v6.n} intervals>"


# The union of (rule, first, last) in which the lowest rule wins, as a list of Allowed.
@cython.wraparound(True)
cdef list paint(list pieces):
    points = sorted({p[1] for p in pieces} | {p[2] + 1 for p in pieces})
    out = []
    for first, behind in zip(points, points[1:]):
        rule = min((p[0] for p in pieces if p[1] <= first <= p[2]), default=None)
        if rule is None:
            continue
        if out and out[-1].rule_id == rule and out[-1].last + 1 == first:
            out[-1] = Allowed(out[-1].first, behind - 1, rule)
        else:
            out.append(Allowed(first, behind - 1, rule))
    return out


# ---- RuleTable ---------------------------------------------------------------------------------

cdef inline uint32_t device_slot(uint32_t ifindex) noexcept nogil:
    return (ifindex * <uint32_t>0x9E3779B1) >> 8


cdef int32_t table_pod_by_device(const table_t *table, uint32_t ifindex) noexcept nogil:
    cdef uint32_t at = device_slot(ifindex) & table.device_mask
    if ifindex == 0:
        return -1
    while table.device_keys[at] != 0:
        if table.device_keys[at] == ifindex:
            return <int32_t>table.device_pods[at]
        at = (at + 1) & table.device_mask
    return -1


cdef inline int compare(const address_t *entry, uint8_t family, const addr_t *address) noexcept nogil:
    if entry.family != family:
        return 1 if entry.family > family else -1
    return by_address(&entry.address, address)


# The first of `n` sorted entries that is not below the address.
cdef const address_t *lower_bound(const address_t *entries, uint32_t n, uint8_t family,
                                  const addr_t *address) noexcept nogil:
    cdef uint32_t half
    while n:
        half = n >> 1
        if compare(&entries[half], family, address) < 0:
            entries += half + 1
            n -= half + 1
        else:
            n = half
    return entries


cdef int32_t table_pod_by_address(const table_t *table, uint8_t family, const addr_t *address) noexcept nogil:
    cdef const address_t *entry = lower_bound(table.by_address, table.n_addresses, family, address)
    if entry == table.by_address + table.n_addresses or compare(entry, family, address) != 0:
        return -1
    return <int32_t>entry.pod


cdef bint table_is_own_node(const table_t *table, uint8_t family, const addr_t *address) noexcept nogil:
    cdef const address_t *entry = lower_bound(table.own_node, table.n_own, family, address)
    return entry != table.own_node + table.n_own and compare(entry, family, address) == 0


cdef bint table_pod_has_address(const table_t *table, uint32_t pod, uint8_t family,
                                const addr_t *address) noexcept nogil:
    cdef const pod_t *p = &table.pods[pod]
    cdef const address_t *a = table.addresses + p.first_address
    cdef uint32_t i
    for i in range(p.n_addresses):
        if a[i].address.low == address.low and a[i].address.high == address.high and a[i].family == family:
            return True
    return False


cdef int by_entry(const void *a, const void *b) noexcept nogil:
    cdef const address_t *x = <const address_t *>a
    cdef const address_t *y = <const address_t *>b
    cdef int order = compare(x, y.family, &y.address)
    if order:
        return order
    return (x.pod > y.pod) - (x.pod < y.pod)


cdef bint write_address(address_t *entry, object packed, uint32_t pod) except False:
    unpack_address(packed, &entry.address)
    entry.family = 4 if len(packed) == 4 else 6
    entry.pod = pod
    return True


@cython.final
# By side and by outcome of a tally.
cdef tuple SIDES = (Direction.INGRESS, Direction.EGRESS)
cdef tuple OUTCOMES = (Reason.POLICY_RULE, Reason.NO_RULE, Reason.SPOOFED, Reason.NO_TABLE)


# What all lanes have counted there.
cdef inline uint64_t tally_at(const table_t *table, size_t word) noexcept nogil:
    cdef uint64_t total = 0
    cdef int lane
    for lane in range(MAX_LANES):
        if table.tallies[lane] != NULL:
            total += get_u64(&table.tallies[lane][word])
    return total


# The first word from `word` on that has grown since it was told, or the number of words.
cdef size_t next_grown(const table_t *table, const uint64_t *seen, size_t word) noexcept nogil:
    while word < table.tally_words and tally_at(table, word) == seen[word]:
        word += 1
    return word


cdef class RuleTable:
    """Everything the engine needs for this node's pods. Immutable, but for what is counted in it.

    `pods` is a sequence of `dataplane.policy.compile.PodEntry`; `ingress` and `egress` hold each
    pod's RuleSet or None (not isolated in that direction), in the same order. `own_node` are this
    node's own packed addresses. `generation` is at least 1 and must grow from table to table.
    ValueError when two pods claim one interface. Of two pods with one address the first has it.
    """

    def __cinit__(self, generation, pods, ingress, egress, own_node):
        cdef size_t size, n_addresses = 0, slots = 8, i, n_devices = 0
        cdef char *at
        cdef pod_t *pod
        cdef address_t *addresses
        cdef address_t *ordered
        cdef address_t *own
        cdef uint32_t *keys
        cdef uint32_t *values
        cdef uint32_t device, slot, count
        cdef size_t *rule_tallies
        self.pods = tuple(pods)
        self._rulesets = (tuple(ingress), tuple(egress))
        self.own_addresses = frozenset(own_node)
        if not 1 <= generation < 1 << 32:
            raise ValueError(f"generation is {generation}, must be 1 to 2**32 - 1")
        if not len(self.pods) == len(self._rulesets[0]) == len(self._rulesets[1]):
            raise ValueError("pods, ingress and egress must have the same length")
        for entry in self.pods:
            n_addresses += len(entry.addresses)
            n_devices += len(entry.devices)
        while slots < 2 * n_devices + 2:
            slots *= 2
        size = padded(len(self.pods) * sizeof(pod_t)) + 2 * padded(n_addresses * sizeof(address_t))
        size += padded(len(self.own_addresses) * sizeof(address_t))
        size += 2 * padded(slots * sizeof(uint32_t)) + padded(2 * len(self.pods) * sizeof(size_t)) + 64
        self.block = calloc(1, size)
        if self.block == NULL:
            raise MemoryError
        self.nbytes = <Py_ssize_t>size
        at = <char *>((<size_t>self.block + 63) & ~<size_t>63)
        pod = <pod_t *>at
        at += padded(len(self.pods) * sizeof(pod_t))
        addresses = <address_t *>at
        at += padded(n_addresses * sizeof(address_t))
        ordered = <address_t *>at
        at += padded(n_addresses * sizeof(address_t))
        own = <address_t *>at
        at += padded(len(self.own_addresses) * sizeof(address_t))
        keys = <uint32_t *>at
        at += padded(slots * sizeof(uint32_t))
        values = <uint32_t *>at
        at += padded(slots * sizeof(uint32_t))
        rule_tallies = <size_t *>at
        self.c.generation = generation
        self.c.n_pods = <uint32_t>len(self.pods)
        self.c.n_addresses = <uint32_t>n_addresses
        self.c.n_own = <uint32_t>len(self.own_addresses)
        self.c.device_mask = <uint32_t>(slots - 1)
        self.c.pods = pod
        self.c.addresses = addresses
        self.c.by_address = ordered
        self.c.own_node = own
        self.c.device_keys = keys
        self.c.device_pods = values
        self.c.rule_tallies = rule_tallies
        self.c.tally_words = len(self.pods) * 2 * TALLY_OUTCOMES
        self._counted = []
        begins = {}
        for i, sides in enumerate(zip(*self._rulesets)):
            for side, rules in zip(SIDES, sides):
                if rules is None:
                    continue
                if (side, rules) not in begins:
                    begins[side, rules] = self.c.tally_words
                    self._counted.append((side, rules))
                    self.c.tally_words += len((<RuleSet?>rules).rules)
                rule_tallies[2 * i + (SIDE_EGRESS if side is Direction.EGRESS else SIDE_INGRESS)] = (
                    begins[side, rules])
        count = 0
        i = 0
        for entry, allows_in, allows_out in zip(self.pods, *self._rulesets):
            pod[i].first_address = count
            for packed in entry.addresses:
                write_address(&addresses[count], packed, <uint32_t>i)
                count += 1
            pod[i].n_addresses = count - pod[i].first_address
            if allows_in is not None:
                pod[i].ingress = &(<RuleSet?>allows_in).c
                pod[i].flags |= POD_INGRESS_ISOLATED
            if allows_out is not None:
                pod[i].egress = &(<RuleSet?>allows_out).c
                pod[i].flags |= POD_EGRESS_ISOLATED
            if entry.spoof_check:
                pod[i].flags |= POD_SPOOF_CHECK
            if entry.branch:
                pod[i].flags |= POD_BRANCH
            if entry.unknown:
                pod[i].flags |= POD_UNKNOWN
            if Direction.INGRESS in entry.audit:
                pod[i].flags |= POD_INGRESS_AUDIT
            if Direction.EGRESS in entry.audit:
                pod[i].flags |= POD_EGRESS_AUDIT
            pod[i].bridge = entry.bridge
            pod[i].uplink = entry.uplink
            if entry.bridge:
                self.c.n_bridged += 1
            for device in entry.devices:
                if device == 0:
                    raise ValueError(f"{entry.key}: an interface index is never 0")
                slot = device_slot(device) & self.c.device_mask
                while keys[slot] != 0:
                    if keys[slot] == device:
                        other = self.pods[values[slot]].key
                        raise ValueError(f"{entry.key} and {other} both claim interface {device}")
                    slot = (slot + 1) & self.c.device_mask
                keys[slot] = device
                values[slot] = <uint32_t>i
            i += 1
        memcpy(ordered, addresses, n_addresses * sizeof(address_t))
        qsort(ordered, n_addresses, sizeof(address_t), by_entry)
        i = 0
        for packed in self.own_addresses:
            write_address(&own[i], packed, 0)
            i += 1
        qsort(own, i, sizeof(address_t), by_entry)

    def __dealloc__(self):
        cdef int lane
        for lane in range(MAX_LANES):
            free(self.c.tallies[lane])
        free(self.seen)
        free(self.block)

    cdef bint open_lane(self, uint32_t lane) except False:
        # A large one takes no memory before something is counted there (zero pages). 8 words more: no
        # cache line is shared with the next lane's.
        if self.c.tallies[lane] == NULL:
            self.c.tallies[lane] = <uint64_t *>calloc(self.c.tally_words + 8, sizeof(uint64_t))
            if self.c.tallies[lane] == NULL:
                raise MemoryError
        return True

    def take_tally(self):
        """What workers have counted by this table since the last call: (pods, rules).

        pods: [((pod's key, direction, reason), packets)]; the reason is `policy-rule` for packets that
        the direction's rules allowed when they were looked up (the flow cache repeats verdicts, which
        is not counted), `no-rule`, `spoofed` or `no-table` for every packet denied for it, `audit` for
        what no rule allowed at an end in audit when it was looked up. rules:
        [((RuleSet, direction, rule id), packets)], look-ups that the rule decided. Not for several
        threads at once.
        """
        cdef size_t word = 0, words = self.c.tally_words, pods = self.c.n_pods * 2 * TALLY_OUTCOMES, begin
        cdef uint64_t total, grown
        if self.seen == NULL:
            self.seen = <uint64_t *>calloc(words + 1, sizeof(uint64_t))
            if self.seen == NULL:
                raise MemoryError
        of_pods = []
        of_rules = []
        counted = iter(self._counted)
        begin = pods
        size = 0
        while True:
            with nogil:
                word = next_grown(&self.c, self.seen, word)
            if word >= words:
                return of_pods, of_rules
            total = tally_at(&self.c, word)
            grown = total - self.seen[word]
            self.seen[word] = total
            if word < pods:
                pod = self.pods[word // (2 * TALLY_OUTCOMES)]
                side = SIDES[word // TALLY_OUTCOMES % 2]
                reason = OUTCOMES[word % TALLY_OUTCOMES]
                if reason is Reason.NO_RULE and side in pod.audit:
                    reason = Reason.AUDIT
                of_pods.append(((pod.key, side, reason), grown))
            else:
                while word >= begin + <size_t>size:
                    begin += <size_t>size
                    side, rules = next(counted)
                    size = len((<RuleSet>rules).rules)
                of_rules.append(((rules, side, word - begin), grown))
            word += 1

    @property
    def generation(self):
        """The table's number: it grows with every table."""
        return self.c.generation

    @property
    def rulesets(self):
        """The distinct RuleSets of all pods."""
        return frozenset(rules for side in self._rulesets for rules in side if rules is not None)

    def ingress(self, pod):
        """The ingress RuleSet of the pod with this index, None when it is not isolated."""
        return self._rulesets[0][pod]

    def egress(self, pod):
        """The egress RuleSet of the pod with this index, None when it is not isolated."""
        return self._rulesets[1][pod]

    def __repr__(self):
        return f"<RuleTable {self.c.generation}: {len(self.pods)} pods, {len(self.rulesets)} rule sets>"
