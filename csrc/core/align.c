/* The weight that gives, on the inputs a layer gets, what the original gives on those it should have got.
 *
 * W* = W + share * W (C - H)T (H + damping)^-1, with H = E[x xT], C = E[x yT], x the inputs as they are and y as they
 * would be: the least squares answer to W* x = W y, damped towards W. Rows are independent once H is factored. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "alloc.h"
#include "blas.h"
#include "cpu.h"
#include "factor.h"
#include "parallel.h"
#include "scheme.h"

enum { CHUNK_ROWS = 64 };

typedef struct {
    const bw_matrix *weight;
    const double *factor; /* (cols, cols), of the damped Hessian */
    const float *change;  /* (cols, cols): C - H */
    double share;
    float *out;
    char *scratch;
    ptrdiff_t bench_bytes;
    atomic_int status;
} align_job;

/* The damped Hessian's upper triangle in `a`; columns never active get the mean diagonal. */
static void damp(const float *h, ptrdiff_t n, double damping, double *a) {
    double sum = 0;
    ptrdiff_t live = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        sum += (double)h[i * n + i];
        live += h[i * n + i] > 0;
    }
    double unit = live ? sum / (double)live : 1.0;
    for (ptrdiff_t i = 0; i < n; i++) {
        for (ptrdiff_t j = i; j < n; j++) a[i * n + j] = (double)h[i * n + j];
        a[i * n + i] += h[i * n + i] > 0 ? damping * unit : unit;
    }
}

static bw_status factor_damped(const float *h, ptrdiff_t n, double *damping, double *a) {
    for (;;) {
        damp(h, n, *damping, a);
        bw_status status = bw_dpotrf_upper(n, a, n);
        if (status != BW_ERR_FACTOR) return status;
        *damping = *damping < 1e-6 ? 1e-6 : 10 * *damping;
        if (*damping > 1e3) return BW_ERR_FACTOR;
    }
}

static void align_rows(void *context, ptrdiff_t chunk, int worker) {
    align_job *job = context;
    ptrdiff_t n = job->weight->cols, first = chunk * CHUNK_ROWS, rows = job->weight->rows - first;
    if (rows > CHUNK_ROWS) rows = CHUNK_ROWS;
    char *bench = job->scratch + worker * job->bench_bytes;
    double *solved = (double *)bench;
    float *pull = (float *)(bench + bw_aligned(CHUNK_ROWS * n * 8)), *weight = job->out + first * n;
    for (ptrdiff_t i = 0; i < rows; i++) bw_cpu()->load_row(job->weight, first + i, 0, n, weight + i * n);
    bw_sgemm(0, 1, rows, n, n, 1, weight, n, job->change, n, 0, pull, n);
    for (ptrdiff_t i = 0; i < rows * n; i++) solved[i] = (double)pull[i];
    bw_status status = bw_dpotrs_upper(n, rows, job->factor, n, solved, n);
    double poison = 0;
    for (ptrdiff_t i = 0; !status && i < rows * n; i++) {
        weight[i] = (float)((double)weight[i] + job->share * solved[i]);
        poison += 0 * (double)weight[i];
    }
    if (!status && isnan(poison)) status = BW_ERR_NONFINITE;
    if (status) atomic_store(&job->status, status);
}

bw_status bw_align(const bw_matrix *weight, const float *hessian, const float *cross, double share, double *damping,
                   float *out) {
    bw_status status = bw_check_matrix(weight);
    if (status) return status;
    ptrdiff_t n = weight->cols, square, bytes;
    if (!(share >= 0 && share <= 1) || !(*damping >= 0 && *damping <= 1e3)) return BW_ERR_ARGUMENT;
    if (!weight->rows || !n) return BW_OK;
    if (!hessian || !cross || !out) return BW_ERR_ARGUMENT;
    if (bw_multiply(n, n, &square) || bw_multiply(square, 8, &bytes) || bw_multiply(n, CHUNK_ROWS * 16, &bytes))
        return BW_ERR_OVERFLOW;
    status = bw_check_hessian(hessian, n);
    if (status) return status;
    ptrdiff_t n_chunks = (weight->rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    int n_workers = bw_n_workers(n_chunks);
    align_job job = {.weight = weight, .share = share, .out = out};
    job.bench_bytes = bw_aligned(CHUNK_ROWS * n * 8) + bw_aligned(CHUNK_ROWS * n * 4);
    double *factor = bw_alloc(square, 8);
    float *change = bw_alloc(square, 4);
    job.scratch = bw_alloc(n_workers, job.bench_bytes);
    if (factor && change && job.scratch) {
        for (ptrdiff_t i = 0; i < square; i++) change[i] = cross[i] - hessian[i];
        status = factor_damped(hessian, n, damping, factor);
        job.factor = factor;
        job.change = change;
        if (!status) status = bw_parallel_for(n_workers, n_chunks, align_rows, &job);
        if (!status) status = (bw_status)atomic_load(&job.status);
    } else {
        status = BW_ERR_MEMORY;
    }
    bw_free(factor);
    bw_free(change);
    bw_free(job.scratch);
    return status;
}
