/* Products with a few tokens: codes are unpacked in registers and multiplied at once, so that the time is that of
 * reading the packed bytes. */
#include <stdatomic.h>
#include <string.h>

#include "alloc.h"
#include "cpu.h"
#include "few.h"
#include "matmul.h"
#include "parallel.h"
#include "scheme.h"

enum {
    CHUNKS = 4,             /* for each thread: large, since what is fetched ahead at the end is lost */
    STACK_BYTES = 48 * 1024 /* most calls of a model of a few billion weights need no allocation */
};

typedef struct few_job {
    const bw_product *product;
    const struct few_job *source; /* the earlier product whose prepared tokens this one reads, or NULL */
    bw_few few;
    ptrdiff_t rows_per_chunk, first_chunk, scratch_bytes;
} few_job;

typedef struct {
    few_job jobs[BW_MOST_TOGETHER];
    int n_jobs;
    char *scratch;
    ptrdiff_t scratch_bytes; /* of one worker */
    atomic_int status;
} few_jobs;

static void multiply_chunk(void *context, ptrdiff_t chunk, int worker) {
    few_jobs *all = context;
    const few_job *job = all->jobs + all->n_jobs - 1;
    while (chunk < job->first_chunk) job--;
    const bw_product *p = job->product;
    ptrdiff_t first = (chunk - job->first_chunk) * job->rows_per_chunk, end = first + job->rows_per_chunk,
              m = p->x->rows;
    if (end > p->weight->rows) end = p->weight->rows;
    for (ptrdiff_t row = first; row < end; row += BW_FEW_ROWS) {
        float sums[BW_FEW_TOKENS * BW_FEW_ROWS];
        ptrdiff_t n = end - row < BW_FEW_ROWS ? end - row : BW_FEW_ROWS;
        char *scratch = all->scratch + worker * all->scratch_bytes;
        if (bw_cpu()->multiply_rows(&job->few, row, n, m, scratch, sums)) atomic_store(&all->status, BW_ERR_SCALE);
        for (ptrdiff_t t = 0; t < m; t++) bw_finish_token(p, t, row, n, sums + t * BW_FEW_ROWS);
    }
}

static void prepare_tokens(const few_job *job, char *tokens, float *x) {
    const bw_product *p = job->product;
    ptrdiff_t cols = p->x->cols, padded = job->few.n_units * BW_UNIT;
    for (ptrdiff_t t = 0; t < p->x->rows; t++) {
        char *token = tokens + t * job->few.token_bytes;
        float *values = job->few.digits ? x : (float *)token;
        bw_cpu()->load_row(p->x, t, 0, cols, values);
        memset(values + cols, 0, (size_t)(padded - cols) * sizeof *values);
        if (job->few.digits) bw_cpu()->prepare_token(&job->few, x, token);
    }
}

static void describe(few_job *job) {
    const bw_product *p = job->product;
    job->scratch_bytes = bw_describe_few(p->weight, &p->layout, p->mode, &job->few);
    ptrdiff_t rows = p->weight->rows / (CHUNKS * bw_n_workers(p->weight->rows)) / BW_FEW_ROWS * BW_FEW_ROWS;
    job->rows_per_chunk = rows < BW_FEW_ROWS ? BW_FEW_ROWS : rows;
}

/* The tokens of an earlier product that a later one may read: both look at them in the same cells and order. */
static const few_job *same_tokens(const few_jobs *all, const few_job *job) {
    for (const few_job *other = all->jobs; other < job; other++)
        if (!job->few.digits || bw_same_token(&other->few, &job->few)) return other;
    return NULL;
}

bw_status bw_multiply_few(const bw_product *products, int n) {
    few_jobs all = {.n_jobs = n};
    ptrdiff_t n_chunks = 0, tokens = 0;
    for (int i = 0; i < n; i++) {
        few_job *job = &all.jobs[i];
        job->product = &products[i];
        describe(job);
        job->first_chunk = n_chunks;
        n_chunks += (products[i].weight->rows - 1) / job->rows_per_chunk + 1;
        job->source = same_tokens(&all, job);
        if (!job->source) tokens += bw_aligned(products->x->rows * job->few.token_bytes);
        if (all.scratch_bytes < job->scratch_bytes) all.scratch_bytes = job->scratch_bytes;
    }
    int n_workers = bw_n_workers(n_chunks);
    ptrdiff_t row = bw_aligned(all.jobs->few.n_units * BW_UNIT * 4);
    ptrdiff_t bytes = tokens + row + n_workers * all.scratch_bytes;
    _Alignas(64) char stack[STACK_BYTES];
    char *memory = bytes <= STACK_BYTES ? stack : bw_alloc(1, bytes);
    if (!memory) return BW_ERR_MEMORY;
    char *at = memory;
    for (int i = 0; i < n; i++) {
        few_job *job = &all.jobs[i];
        job->few.tokens = job->source ? job->source->few.tokens : at;
        if (job->source) continue;
        prepare_tokens(job, at, (float *)(memory + tokens));
        at += bw_aligned(products->x->rows * job->few.token_bytes);
    }
    all.scratch = memory + tokens + row;
    bw_status status = bw_parallel_for(n_workers, n_chunks, multiply_chunk, &all);
    if (memory != stack) bw_free(memory);
    return status ? status : (bw_status)atomic_load(&all.status);
}
