/* Importance: how much each squared error counts. A matrix of the weight's shape, or one row for all of them
 * (row_stride 0). */
#ifndef BW_IMPORTANCE_H
#define BW_IMPORTANCE_H

#include "bitween.h"

/* NULL is fine; otherwise the shape must be the weight's. */
bw_status bw_check_importance(const bw_matrix *importance, const bw_matrix *weight);
/* One row as fp32. BW_ERR_IMPORTANCE when a value is negative or not finite. */
bw_status bw_load_importance(const bw_matrix *importance, ptrdiff_t row, float *out);
/* Makes the largest of a row 1, so that no sum of it can overflow, and returns what that took to divide by; 1 when all
 * are zero. */
float bw_normalise_importance(float *importance, ptrdiff_t n);

#endif
