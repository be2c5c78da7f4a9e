/* Importance: how much each squared error counts. */
#include "importance.h"

#include "cpu.h"

bw_status bw_check_importance(const bw_matrix *importance, const bw_matrix *weight) {
    if (!importance) return BW_OK;
    bw_status status = bw_check_matrix(importance);
    if (status) return status;
    return importance->rows == weight->rows && importance->cols == weight->cols ? BW_OK : BW_ERR_SHAPE;
}

bw_status bw_load_importance(const bw_matrix *importance, ptrdiff_t row, float *out) {
    bw_cpu()->load_row(importance, row, 0, importance->cols, out);
    int bad = 0;
    for (ptrdiff_t i = 0; i < importance->cols; i++) bad |= !(out[i] >= 0.0f && out[i] <= 3.402823466e38f);
    return bad ? BW_ERR_IMPORTANCE : BW_OK;
}

float bw_normalise_importance(float *importance, ptrdiff_t n) {
    float largest = 0;
    for (ptrdiff_t i = 0; i < n; i++) largest = importance[i] > largest ? importance[i] : largest;
    if (largest == 0) return 1;
    for (ptrdiff_t i = 0; i < n; i++) importance[i] /= largest;
    return largest;
}
