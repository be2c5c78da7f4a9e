/* Trellis codes for a matrix: tiles in the order of their columns, each from its weights plus what the errors before it
 * call for, as in gptq.c, but 16 columns at a time.
 *
 * With A = U D UT (factor.h) and T = sum of E[j] U[j][b] over the columns j before block b, the block costs
 * (E[b] + T U[b][b]^-1) S (..)T with S = U[b][b] D[b] U[b][b]T. So it is best chosen near W[b] + T U[b][b]^-1; within
 * it errors are weighed by the diagonal of S, since a path can't look ahead at its own errors. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "alloc.h"
#include "blas.h"
#include "codec/trellis.h"
#include "cpu.h"
#include "factor.h"
#include "float16.h"
#include "parallel.h"
#include "scheme.h"
#include "trellis_path.h"

enum { SIDE = BW_TRELLIS_SIDE, ROWS = 32 /* at a time: two rows of tiles, for small matrices to be shared out well */ };
#define UNITS_A_STEP \
    48.0f /* of the costs: fine enough for rounding not to matter, coarse enough to reach 4 deviations */

/* A column counts at least this much beside the one of its block whose errors cost most: with less its distances would
 * round to nothing, and its weights be those that the path passes by. Where one channel is a thousand times as active
 * as its neighbours, that lost more than all other columns of the matrix together. */
#define LEAST_SHARE 0.125f

typedef struct {
    const bw_matrix *weight;
    const bw_trellis *out;
    const bw_trellis_options *options;
    bw_factor *factor; /* NULL: no feedback */
    ptrdiff_t *order;  /* column at each position; blocks of 16 columns stay together */
    float *costs;      /* (cols): of a squared error at each position */
    ptrdiff_t *starts; /* (col_tiles): byte of each tile within its row */
    int16_t *values;   /* of all states, times 64 */
    int least_rate;
    uint8_t columns[BW_TRELLIS_TILE], rows[BW_TRELLIS_TILE]; /* of each weight of a tile's sequence */
    ptrdiff_t n, col_tiles, row_bytes, bench_bytes, path_bytes;
    bw_gptq_report *report;
    char *scratch;
    atomic_int status;
} trellis_job;

/* Arrays (columns, ROWS), columns by position. */
typedef struct {
    float *weight, *errors, *levels, *pull, *base, *row;
    int16_t *tables; /* (16, states) */
    uint16_t *path;
    float steps[ROWS];
    double costs[ROWS];
} bench;

static ptrdiff_t lay_bench(const trellis_job *job, char *p, bench *b) {
    ptrdiff_t column = ROWS * 4, total = 0, states = (ptrdiff_t)1 << job->out->width;
    const ptrdiff_t sizes[] = {job->n * column, job->n * column, job->n * column,   job->n * column,
                               SIDE * column,   job->n * 4 + 64, SIDE * states * 2, job->path_bytes};
    void **const places[] = {(void **)&b->weight, (void **)&b->errors, (void **)&b->levels, (void **)&b->pull,
                             (void **)&b->base,   (void **)&b->row,    (void **)&b->tables, (void **)&b->path};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (p) *places[i] = p + total;
        total += bw_aligned(sizes[i]);
    }
    return total;
}

/* Of a row's deviation, the deviation of the values that code it best, at each rate: the more choices a step of the
 * path has, the rarer are those far out, and the more it pays to reach beyond the weights. Measured on Gaussian rows;
 * within .03 the same for all widths of a state. */
static const double spreads[BW_TRELLIS_MOST_RATE + 1] = {0, 0.90, 1.02, 1.09, 1.14, 1.19};

static double spread_of(int half_bits) {
    return (spreads[half_bits / 2] + spreads[(half_bits + 1) / 2]) / 2;
}

/* The first scale of a row, from its deviation. The last one is fitted. */
static bw_status first_step(const float *row, ptrdiff_t n, double spread, float *step) {
    double sum = 0;
    for (ptrdiff_t i = 0; i < n; i++) sum += (double)row[i] * (double)row[i];
    if (!isfinite(sum)) return BW_ERR_NONFINITE;
    double scale = spread * sqrt(sum / (double)n) / (double)BW_TRELLIS_DEVIATION / (double)BW_TRELLIS_STEP;
    if (scale > 65504) return BW_ERR_RANGE;
    uint16_t half = bw_to_f16((float)scale);
    *step = bw_from_f16(half ? half : 1) * BW_TRELLIS_STEP;
    return BW_OK;
}

static bw_status load_weights(const trellis_job *job, ptrdiff_t first, ptrdiff_t n_rows, bench *b) {
    memset(b->weight, 0, (size_t)(job->n * ROWS) * 4);
    for (ptrdiff_t i = 0; i < ROWS; i++) {
        b->steps[i] = BW_TRELLIS_STEP;
        if (i >= n_rows) continue;
        bw_cpu()->load_row(job->weight, first + i, 0, job->n, b->row);
        double spread = spread_of(job->options->half_bits);
        bw_status status = first_step(b->row, job->n, spread, &b->steps[i]);
        if (job->options->turned) b->steps[i] = (float)spread / BW_TRELLIS_DEVIATION;
        if (status) return status;
        for (ptrdiff_t k = 0; k < job->n; k++) b->weight[k * ROWS + i] = b->row[job->order[k]];
    }
    return BW_OK;
}

/* Tables of the block's columns; their units, of a step of 1; 0: errors there cost nothing. */
static void make_tables(const trellis_job *job, const float *costs, ptrdiff_t n, bench *b, float *units) {
    ptrdiff_t states = (ptrdiff_t)1 << job->out->width;
    float largest = 0;
    for (ptrdiff_t c = 0; c < n; c++) largest = costs[c] > largest ? costs[c] : largest;
    for (ptrdiff_t c = 0; c < SIDE; c++) {
        float share = c < n && largest > 0 ? fmaxf(sqrtf(costs[c] / largest), costs[c] > 0 ? LEAST_SHARE : 0) : 0;
        int factor = (int)(share * (UNITS_A_STEP * 512) + 0.5f);
        units[c] = (float)factor / 512;
        bw_cpu()->trellis_values(job->values, states, factor, b->tables + c * states);
    }
}

/* One tile: rows `row` .. row+15 of the bench, n columns of b->base. lanes: position within the block of each column in
 * place, -1 for none. */
static void choose_tile(const trellis_job *job, int rate, ptrdiff_t row, ptrdiff_t n_rows, const int *lanes,
                        const float *units, bench *b, int16_t *values, uint8_t *tile) {
    int16_t x[BW_TRELLIS_TILE] = {0};
    uint8_t codes[BW_TRELLIS_TILE];
    ptrdiff_t states = (ptrdiff_t)1 << job->out->width;
    bw_walk walk = {.width = job->out->width, .rate = rate, .columns = job->columns, .x = x, .costs = b->path};
    for (int c = 0; c < SIDE; c++) {
        int k = lanes[c];
        walk.values[c] = b->tables + (k < 0 ? SIDE - 1 : k) * states; /* the last is empty where a column is missing */
    }
    for (int i = 0; i < BW_TRELLIS_TILE; i++) {
        int k = lanes[job->columns[i]], r = job->rows[i];
        if (k < 0 || r >= n_rows) continue;
        float v = b->base[k * ROWS + row + r] / b->steps[row + r] * units[k];
        v = v < -32767 ? -32767 : v > 32767 ? 32767 : v;
        x[i] = (int16_t)lrintf(v);
    }
    bw_find_path(&walk, job->options->thorough, codes);
    bw_pack_path(codes, rate, tile);
    bw_path_values(codes, job->out->width, rate, values);
}

/* Base of the block's n columns from position `at` on. */
static void find_base(const trellis_job *job, ptrdiff_t at, ptrdiff_t n, const bench *b) {
    memcpy(b->base, b->weight + at * ROWS, (size_t)(n * ROWS) * 4);
    if (at && job->factor)
        bw_sgemm(0, 0, n, ROWS, at, 1, job->factor->feedback + at * job->n, job->n, b->errors, ROWS, 1, b->base, ROWS);
}

static void round_blocks(const trellis_job *job, ptrdiff_t first, ptrdiff_t n_rows, bench *b) {
    for (ptrdiff_t at = 0, n; at < job->n; at += n) {
        ptrdiff_t block = job->order[at] / SIDE;
        int lanes[SIDE], rate = job->out->rates[block];
        float units[SIDE];
        n = job->n - block * SIDE < SIDE ? job->n - block * SIDE : SIDE;
        for (int c = 0; c < SIDE; c++) lanes[c] = -1;
        for (ptrdiff_t k = 0; k < n; k++) lanes[job->order[at + k] % SIDE] = (int)k;
        find_base(job, at, n, b);
        make_tables(job, job->costs + at, n, b, units);
        for (ptrdiff_t row = 0; row < n_rows; row += SIDE) {
            int16_t values[BW_TRELLIS_TILE];
            ptrdiff_t used = n_rows - row < SIDE ? n_rows - row : SIDE;
            choose_tile(job, rate, row, used, lanes, units, b, values,
                        job->out->codes + (first + row) / SIDE * job->row_bytes + job->starts[block]);
            for (int i = 0; i < BW_TRELLIS_TILE; i++) {
                int k = lanes[job->columns[i]];
                if (k >= 0) b->levels[(at + k) * ROWS + row + job->rows[i]] = values[i];
            }
        }
        for (ptrdiff_t k = at; k < at + n; k++)
            for (ptrdiff_t r = 0; r < n_rows; r++)
                b->errors[k * ROWS + r] = b->weight[k * ROWS + r] - b->levels[k * ROWS + r] * b->steps[r];
    }
}

/* pull = A x of each row, or costs x. */
static void apply_costs(const trellis_job *job, const float *x, float *pull) {
    if (job->factor) bw_sgemm(0, 0, job->n, ROWS, job->n, 1, job->factor->hessian, job->n, x, ROWS, 0, pull, ROWS);
    else
        for (ptrdiff_t k = 0; k < job->n; k++)
            for (ptrdiff_t r = 0; r < ROWS; r++) pull[k * ROWS + r] = job->costs[k] * x[k * ROWS + r];
}

static void add_dots(const trellis_job *job, const float *x, const float *y, double *sums) {
    for (ptrdiff_t k = 0; k < job->n; k++)
        for (ptrdiff_t r = 0; r < ROWS; r++) sums[r] += (double)x[k * ROWS + r] * (double)y[k * ROWS + r];
}

/* The step of each row by least squares for its codes, where that lowers its cost. */
static void refit(const trellis_job *job, bench *b) {
    double slope[ROWS] = {0}, curve[ROWS] = {0};
    memset(b->costs, 0, sizeof b->costs);
    apply_costs(job, b->errors, b->pull);
    add_dots(job, b->errors, b->pull, b->costs);
    if (!job->options->refit || job->options->turned) return;
    add_dots(job, b->levels, b->pull, slope);
    apply_costs(job, b->levels, b->pull);
    add_dots(job, b->levels, b->pull, curve);
    for (ptrdiff_t r = 0; r < ROWS; r++) {
        double best = (double)b->steps[r] + (curve[r] > 0 ? slope[r] / curve[r] : 0);
        float scale = (float)(best / (double)BW_TRELLIS_STEP);
        if (!(scale > 0 && scale <= 65504)) continue;
        uint16_t half = bw_to_f16(scale);
        float step = bw_from_f16(half ? half : 1) * BW_TRELLIS_STEP;
        double change = (double)step - (double)b->steps[r], gain = change * (2 * slope[r] - change * curve[r]);
        if (!(gain > 0)) continue;
        b->costs[r] -= gain;
        b->steps[r] = step;
        for (ptrdiff_t k = 0; k < job->n; k++)
            b->errors[k * ROWS + r] = b->weight[k * ROWS + r] - b->levels[k * ROWS + r] * step;
    }
}

static void store_rows(const trellis_job *job, ptrdiff_t first, ptrdiff_t n_rows, const bench *b) {
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        job->out->scales[first + r] = bw_to_f16(b->steps[r] / BW_TRELLIS_STEP);
        if (!job->report->row_errors) continue;
        double error = b->costs[r]; /* of the damped matrix, so take out what damping added */
        for (ptrdiff_t k = 0; job->factor && k < job->n; k++) {
            double e = (double)b->errors[k * ROWS + r];
            error -= (double)job->factor->added[k] * e * e;
        }
        job->report->row_errors[first + r] = error > 0 ? error * (job->factor ? job->factor->unit : 1) : 0;
    }
}

static void quantize_rows(void *context, ptrdiff_t chunk, int worker) {
    trellis_job *job = context;
    bench b;
    lay_bench(job, job->scratch + worker * job->bench_bytes, &b);
    ptrdiff_t first = chunk * ROWS, n_rows = job->out->rows - first < ROWS ? job->out->rows - first : ROWS;
    if (atomic_load_explicit(&job->status, memory_order_relaxed)) return;
    memset(b.errors, 0, (size_t)(job->n * ROWS) * 4);
    memset(b.levels, 0, (size_t)(job->n * ROWS) * 4);
    bw_status status = load_weights(job, first, n_rows, &b);
    if (status) {
        atomic_store(&job->status, status);
        return;
    }
    round_blocks(job, first, n_rows, &b);
    refit(job, &b);
    store_rows(job, first, n_rows, &b);
}

/* Turns U into U[..][b] U[b][b]^-1 for each block b, and finds the diagonals of S. */
static void join_feedback(const trellis_job *job) {
    bw_factor *f = job->factor;
    ptrdiff_t stride = f->n;
    for (const bw_block *b = f->blocks; b < f->blocks + f->n_blocks; b++) {
        float *rows = f->feedback + b->first * stride, *own = rows + b->first;
        for (ptrdiff_t k = 0; k < b->n; k++) {
            double cost = (double)f->variance[b->first + k];
            for (ptrdiff_t m = k + 1; m < b->n; m++) {
                double u = (double)own[m * stride + k];
                cost += u * u * (double)f->variance[b->first + m];
            }
            job->costs[b->first + k] = (float)cost;
            for (ptrdiff_t j = 0; j < k; j++) {
                float u = own[k * stride + j];
                for (ptrdiff_t i = 0; i < b->first; i++) rows[k * stride + i] -= u * rows[j * stride + i];
            }
        }
    }
}

/* Rates of the column tiles by what their errors cost, and where each tile begins. */
static bw_status choose_rates(trellis_job *job) {
    double *needs = bw_alloc(job->col_tiles, sizeof *needs);
    if (!needs) return BW_ERR_MEMORY;
    memset(needs, 0, (size_t)job->col_tiles * sizeof *needs);
    for (ptrdiff_t k = 0; k < job->n; k++) needs[job->order[k] / SIDE] += (double)job->costs[k];
    bw_status status =
        bw_trellis_rates(needs, job->col_tiles, job->options->half_bits, job->options->turned, job->out->rates);
    bw_free(needs);
    if (status) return status;
    job->row_bytes = 0;
    job->least_rate = BW_TRELLIS_MOST_RATE;
    for (ptrdiff_t t = 0; t < job->col_tiles; t++) {
        int rate = job->out->rates[t];
        job->starts[t] = job->row_bytes;
        job->row_bytes += rate * 2 * SIDE;
        job->least_rate = rate < job->least_rate ? rate : job->least_rate;
    }
    return BW_OK;
}

static bw_status prepare(trellis_job *job, const float *hessian, const float *importance) {
    for (int i = 0; i < BW_TRELLIS_TILE; i++) {
        job->columns[i] = (uint8_t)bw_trellis_column(i, job->options->turned);
        job->rows[i] = (uint8_t)bw_trellis_row(i, job->options->turned);
    }
    for (ptrdiff_t s = 0; s < (ptrdiff_t)1 << job->out->width; s++)
        job->values[s] = (int16_t)(64 * bw_trellis_value((uint32_t)s, job->out->width));
    if (hessian) {
        const bw_trellis_options *o = job->options;
        bw_status status = bw_factor_new(hessian, job->n, SIDE, o->by_activation, o->damping, job->factor);
        if (status) return status;
        memcpy(job->order, job->factor->order, (size_t)job->n * sizeof *job->order);
        join_feedback(job);
        return choose_rates(job);
    }
    for (ptrdiff_t k = 0; k < job->n; k++) {
        float cost = importance ? importance[k] : 1;
        if (!(cost >= 0 && cost <= 3.402823466e38f)) return BW_ERR_IMPORTANCE;
        job->order[k] = k;
        job->costs[k] = cost;
    }
    return choose_rates(job);
}

static bw_status run(trellis_job *job) {
    bench measure;
    ptrdiff_t n_chunks = (job->out->rows - 1) / ROWS + 1;
    int n_workers = bw_n_workers(n_chunks);
    job->path_bytes = bw_path_bytes(job->out->width, job->least_rate);
    job->bench_bytes = lay_bench(job, NULL, &measure);
    job->scratch = bw_alloc(n_workers, job->bench_bytes);
    if (!job->scratch) return BW_ERR_MEMORY;
    bw_status status = bw_parallel_for(n_workers, n_chunks, quantize_rows, job);
    bw_free(job->scratch);
    return status ? status : (bw_status)atomic_load(&job->status);
}

bw_status bw_trellis_quantize(const bw_matrix *weight, const float *hessian, const float *importance,
                              const bw_trellis_options *options, const bw_trellis *out, bw_gptq_report *report) {
    bw_factor factor = {0};
    trellis_job job = {.weight = weight, .out = out, .options = options, .report = report};
    bw_status status = bw_check_matrix(weight);
    if (status) return status;
    if (weight->rows != out->rows || weight->cols != out->cols) return BW_ERR_SHAPE;
    if (!(options->damping >= 0 && options->damping <= 1e3)) return BW_ERR_ARGUMENT;
    if (options->half_bits < 2 || options->half_bits > 2 * BW_TRELLIS_MOST_RATE) return BW_ERR_ARGUMENT;
    if (out->width < BW_TRELLIS_LEAST_WIDTH || out->width > BW_TRELLIS_MOST_WIDTH) return BW_ERR_ARGUMENT;
    if (options->turned && (out->width != BW_TURNED_WIDTH || options->half_bits % 2)) return BW_ERR_ARGUMENT;
    if (options->turned && (out->rows % BW_TURN || out->cols % BW_TURN)) return BW_ERR_SHAPE;
    report->damping = options->damping;
    report->n_dead = 0;
    job.n = out->cols;
    if (!job.n) return BW_OK;
    if (!out->rates || (out->rows && (!out->codes || !out->scales))) return BW_ERR_ARGUMENT;
    if (job.n > BW_MOST_VALUES / (ROWS * 32)) return BW_ERR_OVERFLOW;
    job.col_tiles = (job.n - 1) / SIDE + 1;
    job.order = bw_alloc(job.n, sizeof *job.order);
    job.costs = bw_alloc(job.n, sizeof *job.costs);
    job.starts = bw_alloc(job.col_tiles, sizeof *job.starts);
    job.values = bw_alloc((ptrdiff_t)1 << out->width, sizeof *job.values);
    job.factor = hessian ? &factor : NULL;
    status = job.order && job.costs && job.starts && job.values ? prepare(&job, hessian, importance) : BW_ERR_MEMORY;
    if (!status && out->rows) status = run(&job);
    if (hessian) {
        report->damping = factor.damping;
        report->n_dead = factor.n_dead;
    }
    bw_factor_free(&factor);
    bw_free(job.order);
    bw_free(job.costs);
    bw_free(job.starts);
    bw_free(job.values);
    return status;
}
