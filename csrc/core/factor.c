/* Order, damp and factor a Hessian. */
#include "factor.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "alloc.h"
#include "blas.h"
#include "scheme.h"

bw_status bw_check_hessian(const float *h, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) {
        double poison = 0;
        for (ptrdiff_t j = 0; j < n; j++) poison += 0 * (double)h[i * n + j];
        if (isnan(poison)) return BW_ERR_HESSIAN;
        if (h[i * n + i] < 0) return BW_ERR_HESSIAN;
    }
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t j = 0; j < i; j++) {
            double gap = fabs((double)h[i * n + j] - (double)h[j * n + i]);
            if (gap > 1e-3 * sqrt((double)h[i * n + i] * (double)h[j * n + j])) return BW_ERR_HESSIAN;
        }
    return BW_OK;
}

static void measure_diagonal(const float *h, bw_factor *f) {
    double sum = 0;
    f->n_dead = 0;
    for (ptrdiff_t i = 0; i < f->n; i++) {
        sum += (double)h[i * f->n + i];
        f->n_dead += h[i * f->n + i] == 0;
    }
    f->unit = f->n_dead == f->n ? 1.0 : sum / (double)(f->n - f->n_dead);
}

typedef struct {
    double key;
    ptrdiff_t index;
} ranked;

static int descending(const void *left, const void *right) {
    const ranked *a = left, *b = right;
    if (a->key != b->key) return a->key < b->key ? 1 : -1;
    return a->index < b->index ? -1 : a->index > b->index;
}

/* Groups by mean diagonal, then columns within each group by diagonal; both descending, ties in place. */
static bw_status rank_columns(const float *h, ptrdiff_t group, bw_factor *f) {
    ptrdiff_t n = f->n, n_groups = (n + group - 1) / group;
    ranked *groups = bw_alloc(n_groups, sizeof *groups), *columns = bw_alloc(n, sizeof *columns);
    if (groups && columns) {
        for (ptrdiff_t g = 0; g < n_groups; g++) groups[g] = (ranked){0, g};
        for (ptrdiff_t j = 0; j < n; j++) {
            ptrdiff_t width = n - j / group * group < group ? n - j / group * group : group;
            columns[j] = (ranked){h[j * n + j], j};
            groups[j / group].key += h[j * n + j] / (double)width;
        }
        qsort(groups, (size_t)n_groups, sizeof *groups, descending);
        for (ptrdiff_t g = 0, at = 0; g < n_groups; g++) {
            ptrdiff_t first = groups[g].index * group, width = n - first < group ? n - first : group;
            qsort(columns + first, (size_t)width, sizeof *columns, descending);
            for (ptrdiff_t j = 0; j < width; j++) f->order[at++] = columns[first + j].index;
        }
    }
    bw_status status = groups && columns ? BW_OK : BW_ERR_MEMORY;
    bw_free(groups);
    bw_free(columns);
    return status;
}

/* A group is a block, or several when it is long. */
static void split_blocks(ptrdiff_t group, bw_factor *f) {
    f->n_blocks = 0;
    for (ptrdiff_t k = 0; k < f->n;) {
        ptrdiff_t g = f->order[k] / group, end = k;
        while (end < f->n && end - k < BW_LONGEST_BLOCK && f->order[end] / group == g) end++;
        f->blocks[f->n_blocks++] = (bw_block){k, end - k, g};
        k = end;
    }
}

static void fill_matrix(const float *h, double damping, bw_factor *f) {
    ptrdiff_t n = f->n;
    for (ptrdiff_t i = 0; i < n; i++) {
        const float *row = h + f->order[i] * n;
        for (ptrdiff_t j = 0; j < n; j++) f->hessian[i * n + j] = (float)((double)row[f->order[j]] / f->unit);
        float *diagonal = f->hessian + i * n + i, before = *diagonal;
        *diagonal = (float)((double)before + (before == 0 ? 1.0 : damping));
        f->added[i] = *diagonal - before;
    }
}

/* A = U UT with U upper: flip rows and columns, and let LAPACK find V, VT V = flipped A. On success `work` (n, n)
 * holds U[i][k] at [n-1-k][n-1-i], i <= k. */
static bw_status reverse_cholesky(const float *a, ptrdiff_t stride, ptrdiff_t n, double *work) {
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t j = 0; j <= i; j++) work[(n - 1 - i) * n + n - 1 - j] = (double)a[i * stride + j];
    return bw_dpotrf_upper(n, work, n);
}

/* Takes the factor of (n, n) out of `work`: rows of U transposed, scaled to a unit diagonal, and D. */
static bw_status read_factor(const double *work, ptrdiff_t n, float *feedback, ptrdiff_t stride, float *variance) {
    for (ptrdiff_t k = 0; k < n; k++) {
        const double *column = work + (n - 1 - k) * n;
        double root = column[n - 1 - k];
        if (!(root > 0)) return BW_ERR_FACTOR;
        variance[k] = (float)(root * root);
        for (ptrdiff_t j = 0; j < k; j++) feedback[k * stride + j] = (float)(column[n - 1 - j] / root);
    }
    return BW_OK;
}

static bw_status factor_matrix(bw_factor *f, double *work) {
    ptrdiff_t n = f->n;
    bw_status status = reverse_cholesky(f->hessian, n, n, work);
    if (!status) status = read_factor(work, n, f->feedback, n, f->variance);
    for (const bw_block *b = f->blocks; !status && b < f->blocks + f->n_blocks; b++) {
        status = reverse_cholesky(f->hessian + b->first * n + b->first, n, b->n, work);
        if (!status)
            status = read_factor(work, b->n, f->local_feedback + b->first * BW_LONGEST_BLOCK, BW_LONGEST_BLOCK,
                                 f->local_variance + b->first);
    }
    return status;
}

static bw_status allocate(ptrdiff_t n, bw_factor *f) {
    ptrdiff_t square, bytes;
    if (bw_multiply(n, n, &square) || bw_multiply(square, 8, &bytes)) return BW_ERR_OVERFLOW;
    f->blocks = bw_alloc(n, sizeof *f->blocks);
    f->order = bw_alloc(n, sizeof *f->order);
    f->hessian = bw_alloc(square, 4);
    f->feedback = bw_alloc(square, 4);
    f->local_feedback = bw_alloc(n, BW_LONGEST_BLOCK * 4);
    f->variance = bw_alloc(n, 4);
    f->local_variance = bw_alloc(n, 4);
    f->added = bw_alloc(n, 4);
    int arrays = f->blocks && f->order && f->hessian && f->feedback && f->local_feedback;
    return arrays && f->variance && f->local_variance && f->added ? BW_OK : BW_ERR_MEMORY;
}

bw_status bw_factor_new(const float *h, ptrdiff_t n, ptrdiff_t group, int by_activation, double damping, bw_factor *f) {
    *f = (bw_factor){.n = n};
    bw_status status = bw_check_hessian(h, n);
    if (!status) status = allocate(n, f);
    if (status) return status;
    double *work = bw_alloc(n * n, 8);
    if (!work) return BW_ERR_MEMORY;
    measure_diagonal(h, f);
    for (ptrdiff_t k = 0; k < n; k++) f->order[k] = k;
    if (by_activation) status = rank_columns(h, group, f);
    if (!status) split_blocks(group, f);
    while (!status) {
        fill_matrix(h, damping, f);
        bw_status failed = factor_matrix(f, work);
        if (failed != BW_ERR_FACTOR) {
            status = failed;
            break;
        }
        damping = damping < 1e-6 ? 1e-6 : 10 * damping;
        if (damping > 1e3) status = BW_ERR_FACTOR;
    }
    f->damping = damping;
    bw_free(work);
    return status;
}

void bw_factor_free(bw_factor *f) {
    bw_free(f->blocks);
    bw_free(f->order);
    bw_free(f->hessian);
    bw_free(f->feedback);
    bw_free(f->local_feedback);
    bw_free(f->variance);
    bw_free(f->local_variance);
    bw_free(f->added);
    *f = (bw_factor){0};
}
