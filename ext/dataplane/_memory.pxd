# Large blocks that are read at random: on huge pages where the kernel has them, because a look-up in
# a table of some megabytes spends more time on its page tables than on the table (madvise(2)).
from libc.stddef cimport size_t

cdef extern from *:
    """
    #include <stdlib.h>
    #include <sys/mman.h>
    #define HUGE_PAGE ((size_t)2 << 20)
    /* NULL without memory; free() ends it. Contents are undefined. */
    static void *block_new(size_t size) {
        void *block = NULL;
        if (size < HUGE_PAGE / 2)
            return posix_memalign(&block, 64, size) == 0 ? block : NULL;
        size = (size + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
        if (posix_memalign(&block, HUGE_PAGE, size) != 0)
            return NULL;
        (void)madvise(block, size, MADV_HUGEPAGE);  /* refused: ordinary pages do as well */
        return block;
    }
    """
    void *block_new(size_t size) noexcept nogil
