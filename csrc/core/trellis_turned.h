/* Trellis matrices that are stored between two Hadamard transforms. */
#ifndef BW_TRELLIS_TURNED_H
#define BW_TRELLIS_TURNED_H

#include "bitween.h"

/* In trellis.c: what one unit of a value is worth in n rows from `row` on, zeros up to whole tiles; BW_ERR_SCALE for
 * scales that are not positive. */
bw_status bw_load_steps(const bw_trellis *tensor, ptrdiff_t row, ptrdiff_t n, float *steps);
/* What a turned matrix asks for beyond bw_trellis_sizes. */
bw_status bw_check_turned(const bw_trellis *tensor, const bw_trellis_layout *layout);
/* As bw_trellis_dequantize and bw_trellis_matmul, which call them after their checks; n, rows and cols above 0. */
bw_status bw_turned_dequantize(const bw_trellis *tensor, const bw_trellis_layout *layout, ptrdiff_t first, ptrdiff_t n,
                               bw_dtype dtype, void *out);
bw_status bw_turned_matmul(const bw_matrix *x, const bw_trellis *weight, const bw_trellis_layout *layout,
                           const bw_matrix *bias, bw_dtype dtype, void *out);

#endif
