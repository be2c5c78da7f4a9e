/* The only place that takes memory: aligned for the widest vectors, sizes checked for overflow. */
#include "alloc.h"

#include <stdlib.h>

void *bw_alloc(ptrdiff_t count, ptrdiff_t size) {
    size_t bytes;
    if (count < 0 || size < 0 || __builtin_mul_overflow((size_t)count, (size_t)size, &bytes)) return NULL;
    if (bytes > (size_t)PTRDIFF_MAX - 64) return NULL;
    void *p = NULL;
    return posix_memalign(&p, 64, bytes ? (bytes + 63) / 64 * 64 : 64) ? NULL : p;
}

void bw_free(void *p) {
    free(p);
}
