/* A product with few tokens made ready for the kernels; used by matmul_few.c and by the decoder. */
#ifndef BW_FEW_H
#define BW_FEW_H

#include "kernels/table.h"

enum { BW_UNIT = 64 }; /* columns, see kernels/product.h */

/* Fills all of `few` but the tokens; `layout` must outlive it. Returns the scratch bytes that multiply_rows wants. */
ptrdiff_t bw_describe_few(const bw_quantized *weight, const bw_layout *layout, bw_mode mode, bw_few *few);

/* Whether two products by rounded activations look at a prepared token in the same way. */
static inline int bw_same_token(const bw_few *a, const bw_few *b) {
    return a->cell_shift == b->cell_shift && a->order == b->order;
}

#endif
