/* What scheme.c offers to the rest of the core besides bitween.h. */
#ifndef BW_SCHEME_H
#define BW_SCHEME_H

#include "bitween.h"

#define BW_N_LEVELS 8
extern const int32_t bw_all_levels[BW_N_LEVELS];

/* Most elements of a matrix, and of one dimension: beyond any memory, yet so far below overflow that offsets and
 * scratch sizes, which take less than 4096 bytes an element, need no checks of their own. */
#define BW_MOST_VALUES (PTRDIFF_MAX / 4096)

/* BW_ERR_SHAPE for a negative dimension, BW_ERR_OVERFLOW beyond BW_MOST_VALUES. */
bw_status bw_check_shape(ptrdiff_t rows, ptrdiff_t cols);
/* a * b, or BW_ERR_OVERFLOW when it does not fit or a factor is negative. */
bw_status bw_multiply(ptrdiff_t a, ptrdiff_t b, ptrdiff_t *product);
/* Packed bytes of one row of codes. */
bw_status bw_row_bytes(ptrdiff_t cols, int32_t levels, ptrdiff_t *bytes);

#endif
