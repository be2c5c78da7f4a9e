/* The squared error of many schemes in one pass over a weight: a row is loaded once, and while it is in the cache
 * every scheme is tried on it. Schemes with groups of one size share their ranges. */
#include <stdatomic.h>
#include <string.h>

#include "alloc.h"
#include "cpu.h"
#include "importance.h"
#include "parallel.h"
#include "scheme.h"

enum { CHUNK_VALUES = 16384 };

typedef struct {
    const bw_matrix *weight, *importance;
    const bw_scheme *schemes;
    ptrdiff_t n_schemes;
    const double *row_importance;
    int clip;
    double *sums; /* (chunks, schemes) */
    char *scratch;
    ptrdiff_t scratch_bytes, rows_per_chunk;
    atomic_int status;
} search_job;

/* Scratch of one worker. Column arrays are padded to whole vectors, block arrays hold one number per 16 columns. */
typedef struct {
    float *values, *importance; /* columns */
    double unit;                /* of the importance, whose largest is made 1, so that no sum of it overflows */
    float *low, *high;          /* blocks */
    float *group_low, *group_high, *scales, *zeros;
    uint16_t *halves;
    int64_t group_size; /* of group_low and group_high; 0: none yet */
} search_row;

static ptrdiff_t n_blocks(ptrdiff_t cols) {
    return (cols + 15) / 16;
}

static search_row carve(const search_job *job, int worker) {
    ptrdiff_t column_bytes = bw_aligned(n_blocks(job->weight->cols) * 64);
    ptrdiff_t block_bytes = bw_aligned(n_blocks(n_blocks(job->weight->cols)) * 64);
    char *p = job->scratch + worker * job->scratch_bytes;
    search_row row = {.values = (float *)p};
    row.importance = (float *)(p += column_bytes);
    row.low = (float *)(p += column_bytes);
    row.high = (float *)(p += block_bytes);
    row.group_low = (float *)(p += block_bytes);
    row.group_high = (float *)(p += block_bytes);
    row.scales = (float *)(p += block_bytes);
    row.zeros = (float *)(p += block_bytes);
    row.halves = (uint16_t *)(p + block_bytes);
    return row;
}

static ptrdiff_t scratch_bytes(ptrdiff_t cols) {
    return 2 * bw_aligned(n_blocks(cols) * 64) + 7 * bw_aligned(n_blocks(n_blocks(cols)) * 64);
}

static bw_status load(const search_job *job, ptrdiff_t index, search_row *row) {
    ptrdiff_t cols = job->weight->cols, padding = n_blocks(cols) * 16 - cols;
    bw_status status = BW_OK;
    bw_cpu()->load_row(job->weight, index, 0, cols, row->values);
    memset(row->values + cols, 0, (size_t)padding * 4);
    row->unit = 1;
    if (job->importance) {
        status = bw_load_importance(job->importance, index, row->importance);
        row->unit = bw_normalise_importance(row->importance, cols);
    } else
        for (ptrdiff_t i = 0; i < cols; i++) row->importance[i] = 1.0f;
    memset(row->importance + cols, 0, (size_t)padding * 4);
    row->group_size = 0;
    if (!status && !job->clip) status = bw_cpu()->find_ranges(row->values, cols, row->low, row->high);
    return status;
}

/* Ranges of groups from those of their blocks; the padding repeats the last group. */
static void join_ranges(search_row *row, ptrdiff_t cols, ptrdiff_t group, ptrdiff_t n_groups) {
    ptrdiff_t per_group = n_blocks(group), end = n_blocks(cols), padded = n_blocks(n_groups) * 16;
    for (ptrdiff_t g = 0; g < n_groups; g++) {
        float low = 0, high = 0;
        for (ptrdiff_t b = g * per_group; b < (g + 1) * per_group && b < end; b++) {
            low = row->low[b] < low ? row->low[b] : low;
            high = row->high[b] > high ? row->high[b] : high;
        }
        row->group_low[g] = low;
        row->group_high[g] = high;
    }
    for (ptrdiff_t g = n_groups; g < padded; g++) {
        row->group_low[g] = row->group_low[n_groups - 1];
        row->group_high[g] = row->group_high[n_groups - 1];
    }
}

static bw_status find_grid(const search_job *job, const bw_scheme *scheme, search_row *row) {
    const bw_isa *isa = bw_cpu();
    ptrdiff_t cols = job->weight->cols, group = scheme->group_size < 0 ? cols : (ptrdiff_t)scheme->group_size;
    ptrdiff_t n_groups = (cols - 1) / group + 1;
    bw_status status;
    if (job->clip) {
        status = isa->clip_grid(row->values, cols, group, scheme, job->importance ? row->importance : NULL, row->halves,
                                row->zeros);
    } else if (scheme->levels == 2 && scheme->symmetric) {
        status = isa->rtn_grid(row->values, cols, group, scheme, row->halves, row->zeros);
    } else {
        if (row->group_size != scheme->group_size) join_ranges(row, cols, group, n_groups);
        row->group_size = scheme->group_size;
        return isa->range_grid(row->group_low, row->group_high, n_groups, scheme, row->scales, row->zeros);
    }
    const bw_matrix halves = {row->halves, 1, n_groups, n_groups, 1, BW_F16};
    if (!status) isa->load_row(&halves, 0, 0, n_groups, row->scales);
    return status;
}

static void search_chunk(void *context, ptrdiff_t chunk, int worker) {
    search_job *job = context;
    search_row row = carve(job, worker);
    ptrdiff_t cols = job->weight->cols, first = chunk * job->rows_per_chunk, end = first + job->rows_per_chunk;
    if (end > job->weight->rows) end = job->weight->rows;
    double *sums = job->sums + chunk * job->n_schemes;
    memset(sums, 0, (size_t)job->n_schemes * sizeof *sums);
    for (ptrdiff_t r = first; r < end; r++) {
        bw_status status = load(job, r, &row);
        for (ptrdiff_t s = 0; s < job->n_schemes && !status; s++) {
            const bw_scheme *scheme = &job->schemes[s];
            ptrdiff_t group = scheme->group_size < 0 ? cols : (ptrdiff_t)scheme->group_size;
            status = find_grid(job, scheme, &row);
            if (status) break;
            double error =
                bw_cpu()->grid_error(row.values, row.importance, cols, group, scheme->levels, row.scales, row.zeros);
            sums[s] += error * row.unit * (job->row_importance ? job->row_importance[r] : 1.0);
        }
        if (status) {
            atomic_store(&job->status, status);
            return;
        }
    }
}

static bw_status check(const search_job *job, const double *out) {
    bw_layout layout;
    ptrdiff_t n;
    bw_status status = bw_check_matrix(job->weight);
    if (!status) status = bw_check_importance(job->importance, job->weight);
    if (status) return status;
    if (job->n_schemes < 0 || bw_multiply(job->n_schemes, job->weight->rows, &n) || bw_multiply(n, 8, &n))
        return BW_ERR_OVERFLOW;
    if (job->n_schemes && (!job->schemes || !out)) return BW_ERR_ARGUMENT;
    for (ptrdiff_t s = 0; s < job->n_schemes && !status; s++)
        status = bw_scheme_layout(&job->schemes[s], job->weight->rows, job->weight->cols, &layout);
    for (ptrdiff_t r = 0; job->row_importance && r < job->weight->rows && !status; r++)
        if (!(job->row_importance[r] >= 0 && job->row_importance[r] <= 1e300)) status = BW_ERR_IMPORTANCE;
    return status;
}

bw_status bw_search(const bw_matrix *weight, const bw_scheme *schemes, ptrdiff_t n_schemes, const bw_matrix *importance,
                    const double *row_importance, int clip, double *out) {
    search_job job = {.weight = weight,
                      .importance = importance,
                      .schemes = schemes,
                      .n_schemes = n_schemes,
                      .row_importance = row_importance,
                      .clip = clip};
    bw_status status = check(&job, out);
    if (status || !n_schemes) return status;
    memset(out, 0, (size_t)n_schemes * sizeof *out);
    if (!weight->rows || !weight->cols) return BW_OK;
    job.rows_per_chunk = CHUNK_VALUES / weight->cols + 1;
    ptrdiff_t n_chunks = (weight->rows - 1) / job.rows_per_chunk + 1;
    int n_workers = bw_n_workers(n_chunks);
    job.scratch_bytes = scratch_bytes(weight->cols);
    job.scratch = bw_alloc(n_workers, job.scratch_bytes);
    job.sums = bw_alloc(n_chunks, n_schemes * (ptrdiff_t)sizeof *job.sums);
    if (!job.scratch || !job.sums) status = BW_ERR_MEMORY;
    else {
        status = bw_parallel_for(n_workers, n_chunks, search_chunk, &job);
        if (!status) status = (bw_status)atomic_load(&job.status);
    }
    for (ptrdiff_t c = 0; c < n_chunks && !status; c++)
        for (ptrdiff_t s = 0; s < n_schemes; s++) out[s] += job.sums[c * n_schemes + s];
    bw_free(job.sums);
    bw_free(job.scratch);
    return status;
}
