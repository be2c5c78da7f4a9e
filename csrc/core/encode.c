/* Codes on a given grid: scales and zeros come in with `out`. */
#include "rows.h"

#include <string.h>

static bw_status keep_grid(const bw_row_job *job, bw_row *row) {
    const bw_quantized *out = job->out;
    memcpy(row->scales, out->scales + row->index * job->layout.n_groups, (size_t)job->layout.n_groups * 2);
    return bw_row_zeros(out, &job->layout, row->index, row->bytes, row->zeros);
}

bw_status bw_encode(const bw_matrix *weight, const bw_quantized *out) {
    return bw_quantize_rows(weight, NULL, out, keep_grid, NULL);
}
