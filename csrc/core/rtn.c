/* Quantize by rounding to nearest: each row finds its groups' ranges, encodes and packs itself. */
#include "rows.h"

static bw_status rtn_one(const bw_row_job *job, bw_row *row) {
    return bw_cpu()->rtn_grid(row->values, job->out->cols, job->layout.group, &job->out->scheme, row->scales,
                              row->zeros);
}

bw_status bw_quantize_rtn(const bw_matrix *weight, const bw_quantized *out) {
    return bw_quantize_rows(weight, NULL, out, rtn_one, NULL);
}
