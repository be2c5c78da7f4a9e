/* Memory for the core: 64-byte aligned, NULL on overflow or when there is none. Release with bw_free. */
#ifndef BW_ALLOC_H
#define BW_ALLOC_H

#include <stddef.h>
#include <stdint.h>

void *bw_alloc(ptrdiff_t count, ptrdiff_t size);
void bw_free(void *p);

/* Bytes rounded up to a whole number of cache lines, to carve one piece of memory into several. */
static inline ptrdiff_t bw_aligned(ptrdiff_t bytes) {
    return (bytes + 63) / 64 * 64;
}

#endif
