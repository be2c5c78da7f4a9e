/* Memory for the core: 64-byte aligned, NULL on overflow or when there is none. Release with bw_free. */
#ifndef BW_ALLOC_H
#define BW_ALLOC_H

#include <stddef.h>
#include <stdint.h>

void *bw_alloc(ptrdiff_t count, ptrdiff_t size);
void bw_free(void *p);

#endif
