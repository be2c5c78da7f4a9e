/* Quantize on the best range of each group, under an importance of each squared error. */
#include "rows.h"

/* A row's importance counts only against itself; its largest becomes 1, so that no sum can overflow. */
static void normalise(float *importance, ptrdiff_t n) {
    float largest = 0;
    for (ptrdiff_t i = 0; i < n; i++) largest = importance[i] > largest ? importance[i] : largest;
    if (largest > 0)
        for (ptrdiff_t i = 0; i < n; i++) importance[i] /= largest;
}

static bw_status clip_one(const bw_row_job *job, bw_row *row) {
    if (row->importance) normalise(row->importance, job->out->cols);
    return bw_cpu()->clip_grid(row->values, job->out->cols, job->layout.group, &job->out->scheme, row->importance,
                               row->scales, row->zeros);
}

bw_status bw_quantize_clip(const bw_matrix *weight, const bw_matrix *importance, const bw_quantized *out) {
    return bw_quantize_rows(weight, importance, out, clip_one, NULL);
}
