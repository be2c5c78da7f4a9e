/* Quantize on the best range of each group, under an importance of each squared error. */
#include "importance.h"
#include "rows.h"

static bw_status clip_one(const bw_row_job *job, bw_row *row) {
    if (row->importance) bw_normalise_importance(row->importance, job->out->cols); /* counts only within the row */
    return bw_cpu()->clip_grid(row->values, job->out->cols, job->layout.group, &job->out->scheme, row->importance,
                               row->scales, row->zeros);
}

bw_status bw_quantize_clip(const bw_matrix *weight, const bw_matrix *importance, const bw_quantized *out) {
    return bw_quantize_rows(weight, importance, out, clip_one, NULL);
}
