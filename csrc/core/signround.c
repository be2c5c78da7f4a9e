/* Trainable rounding over all rows: values on the grid, and the gradient that trains offsets and ranges. */
#include "cpu.h"
#include "parallel.h"
#include "scheme.h"

enum { CHUNK_VALUES = 32768 };

typedef struct {
    const bw_rounding *r;
    bw_layout layout;
    const float *grad; /* NULL: forward */
    float *out;        /* forward: values; backward: into_offset */
    float *into_low, *into_high;
    ptrdiff_t rows_per_chunk;
} job;

static void run_chunk(void *context, ptrdiff_t chunk, int worker) {
    (void)worker;
    const job *j = context;
    const bw_rounding *r = j->r;
    ptrdiff_t end = (chunk + 1) * j->rows_per_chunk;
    for (ptrdiff_t row = chunk * j->rows_per_chunk; row < (end < r->rows ? end : r->rows); row++) {
        ptrdiff_t at = row * r->cols, g = row * j->layout.n_groups;
        const float *low = r->low ? r->low + g : NULL;
        if (!j->grad)
            bw_cpu()->train_forward(r->weight + at, r->offset + at, low, r->high + g, r->cols, j->layout.group,
                                    &r->scheme, j->out + at);
        else
            bw_cpu()->train_backward(r->weight + at, r->offset + at, low, r->high + g, j->grad + at, r->cols,
                                     j->layout.group, &r->scheme, j->out + at, j->into_low ? j->into_low + g : NULL,
                                     j->into_high + g);
    }
}

static bw_status run(job *j) {
    const bw_rounding *r = j->r;
    bw_status status = bw_scheme_layout(&r->scheme, r->rows, r->cols, &j->layout);
    if (status || !r->rows || !r->cols) return status;
    int ranges = r->high && (r->scheme.symmetric || r->low);
    if (!r->weight || !r->offset || !ranges || !j->out) return BW_ERR_ARGUMENT;
    j->rows_per_chunk = CHUNK_VALUES / r->cols + 1;
    ptrdiff_t n_chunks = (r->rows - 1) / j->rows_per_chunk + 1;
    return bw_parallel_for(bw_n_workers(n_chunks), n_chunks, run_chunk, j);
}

bw_status bw_train_forward(const bw_rounding *rounding, float *values) {
    job j = {.r = rounding, .out = values};
    return run(&j);
}

bw_status bw_train_backward(const bw_rounding *rounding, const float *grad, float *into_offset, float *into_low,
                            float *into_high) {
    job j = {.r = rounding, .grad = grad, .out = into_offset, .into_low = into_low, .into_high = into_high};
    if (!grad || !into_high || (!rounding->scheme.symmetric && !into_low)) return BW_ERR_ARGUMENT;
    return run(&j);
}
