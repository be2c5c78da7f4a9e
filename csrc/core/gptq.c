/* GPTQ: columns rounded in order, each from its weight plus what the errors before it call for.
 *
 * Rows are independent once the Hessian is factored. They run 64 at a time as the lanes of a tile; the feedback
 * between blocks is one product, the feedback inside a block goes column by column. A group's range is searched when
 * its block begins, from the weights as they then are, by rounding the block on every candidate. */
#include <stdatomic.h>
#include <string.h>

#include "alloc.h"
#include "blas.h"
#include "pack.h"
#include "parallel.h"
#include "scheme.h"
#include "tile.h"

typedef struct {
    bw_tile_job tile;
    const bw_matrix *weight;
    const bw_quantized *out;
    bw_layout layout;
    bw_gptq_report *report;
    char *scratch;
    ptrdiff_t bench_bytes;
    atomic_int status;
} gptq_job;

/* Sets the pointers of a bench into memory at p; returns the bytes it takes. p may be NULL, to measure. */
static ptrdiff_t lay_bench(const gptq_job *job, char *p, bw_bench *b) {
    ptrdiff_t cols = job->out->cols, groups = job->layout.n_groups, tile = BW_TILE_ROWS,
              block = BW_TILE_ROWS * BW_LONGEST_BLOCK, total = 0;
    const ptrdiff_t sizes[] = {cols * tile * 4,
                               cols * tile * 4,
                               cols * tile,
                               groups * (ptrdiff_t)sizeof(bw_tile_grid),
                               block * 4,
                               block * 4,
                               block * 4,
                               block * 4,
                               block,
                               (cols > block ? cols : block) * 4,
                               (cols > groups ? cols : groups) + 8};
    void **const places[] = {(void **)&b->weight, (void **)&b->errors,       (void **)&b->codes,
                             (void **)&b->grids,  (void **)&b->base,         (void **)&b->pull,
                             (void **)&b->levels, (void **)&b->trial_errors, (void **)&b->trial_codes,
                             (void **)&b->rows,   (void **)&b->bytes};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (p) *places[i] = p + total;
        total += (sizes[i] + 63) / 64 * 64;
    }
    return total;
}

static void load_weights(const gptq_job *job, ptrdiff_t first, ptrdiff_t n_rows, const bw_bench *b) {
    const bw_factor *f = job->tile.factor;
    if (n_rows < BW_TILE_ROWS) memset(b->weight, 0, (size_t)(f->n * BW_TILE_ROWS) * 4);
    for (ptrdiff_t i = 0; i < n_rows; i++) {
        bw_cpu()->load_row(job->weight, first + i, 0, f->n, b->rows);
        for (ptrdiff_t k = 0; k < f->n; k++) b->weight[k * BW_TILE_ROWS + i] = b->rows[f->order[k]];
    }
}

/* Ranges of `n` columns at `columns`, seen as one group: min-max, or clipped for the least error. */
static bw_status find_ranges(const gptq_job *job, const float *columns, const float *variance, ptrdiff_t n, int clip,
                             bw_bench *b, bw_tile_grid *grid) {
    const bw_isa *isa = bw_cpu();
    const bw_scheme *scheme = &job->tile.scheme;
    for (int i = 0; i < BW_TILE_ROWS; i++) {
        uint16_t scale;
        for (ptrdiff_t k = 0; k < n; k++) b->rows[k] = columns[k * BW_TILE_ROWS + i];
        bw_status status = clip ? isa->clip_grid(b->rows, n, n, scheme, variance, &scale, grid->zeros + i)
                                : isa->rtn_grid(b->rows, n, n, scheme, &scale, grid->zeros + i);
        if (status) return status;
        bw_matrix half = {&scale, 1, 1, 1, 1, BW_F16};
        isa->load_row(&half, 0, 0, 1, grid->scales + i);
        grid->inverses[i] = 1.0f / grid->scales[i];
    }
    return BW_OK;
}

/* What the block is rounded from: its weights plus the feedback of all columns before it. */
static void find_base(const bw_factor *f, const bw_block *block, const bw_bench *b) {
    memcpy(b->base, b->weight + block->first * BW_TILE_ROWS, (size_t)(block->n * BW_TILE_ROWS) * 4);
    bw_sgemm(0, 0, block->n, BW_TILE_ROWS, block->first, 1, f->feedback + block->first * f->n, f->n, b->errors,
             BW_TILE_ROWS, 1, b->base, BW_TILE_ROWS);
}

static bw_status round_tile(const gptq_job *job, bw_bench *b) {
    const bw_factor *f = job->tile.factor;
    int own_range = job->layout.group <= BW_LONGEST_BLOCK;
    memset(b->costs, 0, sizeof b->costs);
    if (!own_range) {
        bw_status status = find_ranges(job, b->weight, f->variance, f->n, 1, b, b->grids);
        if (status) return status;
    }
    for (ptrdiff_t i = 0; i < f->n_blocks; i++) {
        const bw_block *block = f->blocks + i;
        ptrdiff_t at = block->first * BW_TILE_ROWS;
        float costs[BW_TILE_ROWS];
        bw_tile t = {b->weight + at, b->base,  f->feedback + block->first * (f->n + 1), f->variance + block->first,
                     f->n,           block->n, (float)(job->tile.scheme.levels - 1)};
        find_base(f, block, b);
        if (own_range) {
            bw_tile_grid start;
            bw_status status = find_ranges(job, b->base, NULL, block->n, 0, b, &start);
            if (status) return status;
            b->grids[block->group] = start;
            for (int r = 0; r < BW_TILE_ROWS; r++) costs[r] = 3e38f;
            bw_tile_search(&job->tile, &t, &start, BW_WIDE, b->trial_errors, b->grids + block->group, costs);
        }
        bw_cpu()->tile_round(&t, b->grids + block->group, b->errors + at, b->codes + at, costs);
        for (int r = 0; r < BW_TILE_ROWS; r++) b->costs[r] += (double)costs[r];
    }
    return BW_OK;
}

static void store_row(const gptq_job *job, const bw_bench *b, ptrdiff_t row, ptrdiff_t lane) {
    const bw_quantized *out = job->out;
    const bw_layout *l = &job->layout;
    const bw_factor *f = job->tile.factor;
    uint8_t *codes = out->codes + row * l->row_bytes;
    uint16_t *scales = out->scales + row * l->n_groups;
    for (ptrdiff_t k = 0; k < f->n; k++) b->bytes[f->order[k]] = b->codes[k * BW_TILE_ROWS + lane];
    memset(codes + l->row_bytes - 4, 0, 4);
    bw_cpu()->pack(b->bytes, f->n, out->scheme.levels, codes);
    for (ptrdiff_t g = 0; g < l->n_groups; g++) {
        bw_cpu()->store(b->grids[g].scales + lane, 1, BW_F16, scales + g);
        b->bytes[g] = (uint8_t)b->grids[g].zeros[lane];
    }
    if (!out->scheme.symmetric)
        bw_pack_zeros(b->bytes, l->n_groups, out->scheme.levels, out->zeros + row * l->row_zero_bytes);
    if (!job->report->row_errors) return;
    double error = b->costs[lane]; /* of the damped matrix, so take out what damping added */
    for (ptrdiff_t k = 0; k < f->n; k++) {
        double e = (double)b->errors[k * BW_TILE_ROWS + lane];
        error -= (double)f->added[k] * e * e;
    }
    job->report->row_errors[row] = error > 0 ? error * f->unit : 0;
}

static void quantize_tile(void *context, ptrdiff_t chunk, int worker) {
    gptq_job *job = context;
    bw_bench bench;
    lay_bench(job, job->scratch + worker * job->bench_bytes, &bench);
    ptrdiff_t first = chunk * BW_TILE_ROWS, n_rows = job->out->rows - first;
    if (n_rows > BW_TILE_ROWS) n_rows = BW_TILE_ROWS;
    if (atomic_load_explicit(&job->status, memory_order_relaxed)) return;
    load_weights(job, first, n_rows, &bench);
    bw_status status = round_tile(job, &bench);
    if (status) {
        atomic_store(&job->status, status);
        return;
    }
    bw_tile_refine(&job->tile, &bench);
    for (ptrdiff_t i = 0; i < n_rows; i++) store_row(job, &bench, first + i, i);
}

static bw_status run_tiles(gptq_job *job) {
    bw_bench measure;
    ptrdiff_t n_tiles = (job->out->rows + BW_TILE_ROWS - 1) / BW_TILE_ROWS;
    int n_workers = bw_n_workers(n_tiles);
    job->bench_bytes = lay_bench(job, NULL, &measure);
    job->scratch = bw_alloc(n_workers, job->bench_bytes);
    if (!job->scratch) return BW_ERR_MEMORY;
    bw_status status = bw_parallel_for(n_workers, n_tiles, quantize_tile, job);
    bw_free(job->scratch);
    return status ? status : (bw_status)atomic_load(&job->status);
}

bw_status bw_quantize_gptq(const bw_matrix *weight, const float *hessian, const bw_gptq_options *options,
                           const bw_quantized *out, bw_gptq_report *report) {
    bw_factor factor;
    gptq_job job = {.tile = {&factor, options, out->scheme, 0}, .weight = weight, .out = out, .report = report};
    bw_status status = bw_check_matrix(weight);
    ptrdiff_t bytes;
    if (!status) status = bw_check_quantized(out, &job.layout);
    if (status) return status;
    if (weight->rows != out->rows || weight->cols != out->cols) return BW_ERR_SHAPE;
    if (!(options->damping >= 0 && options->damping <= 1e3) || !(options->tolerance >= 0) || options->sweeps < 0)
        return BW_ERR_ARGUMENT;
    if (bw_multiply(out->cols, BW_TILE_ROWS * 16, &bytes)) return BW_ERR_OVERFLOW;
    report->damping = options->damping;
    report->n_dead = 0;
    if (!out->rows || !out->cols) return BW_OK;
    if (!hessian) return BW_ERR_ARGUMENT;
    job.tile.group = job.layout.group;
    status = bw_factor_new(hessian, out->cols, job.layout.group, options->by_activation, options->damping, &factor);
    if (!status) status = run_tiles(&job);
    report->damping = factor.damping;
    report->n_dead = factor.n_dead;
    bw_factor_free(&factor);
    return status;
}
