/* Codes on a given grid: scales and zeros come in with `out`. */
#include <string.h>

#include "float16.h"
#include "rows.h"

static int all_finite(const float *values, ptrdiff_t n) {
    int bad = 0;
    for (ptrdiff_t i = 0; i < n; i++) bad |= (bw_bits_of_float(values[i]) & 0x7f800000u) == 0x7f800000u;
    return !bad;
}

static bw_status keep_grid(const bw_row_job *job, bw_row *row) {
    const bw_quantized *out = job->out;
    if (!all_finite(row->values, out->cols)) return BW_ERR_NONFINITE;
    memcpy(row->scales, out->scales + row->index * job->layout.n_groups, (size_t)job->layout.n_groups * 2);
    return bw_row_zeros(out, &job->layout, row->index, row->bytes, row->zeros);
}

bw_status bw_encode(const bw_matrix *weight, const bw_quantized *out) {
    return bw_quantize_rows(weight, NULL, out, keep_grid, NULL);
}
