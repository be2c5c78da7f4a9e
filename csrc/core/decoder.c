/* A step of a decoder: all blocks, one parallel region. */
#include "decoder.h"

#include <string.h>

#include "alloc.h"
#include "cpu.h"
#include "matmul.h"
#include "parallel.h"
#include "scheme.h"

static ptrdiff_t most(ptrdiff_t a, ptrdiff_t b) {
    return a > b ? a : b;
}

/* ---- arguments ---- */

/* Most bytes that any layer wants. */
typedef struct {
    ptrdiff_t scratch, token;
} needs;

static bw_status check_part(const bw_part *part, ptrdiff_t rows, ptrdiff_t cols, needs *all) {
    ptrdiff_t scratch, token;
    if (!part->linear) return BW_ERR_ARGUMENT;
    bw_status status = bw_linear_needs(part->linear, &scratch, &token);
    if (status) return status;
    if (part->rows != rows || part->linear->cols != cols || part->first < 0 || part->first > part->linear->rows - rows)
        return BW_ERR_SHAPE;
    all->scratch = most(all->scratch, scratch);
    all->token = most(all->token, token);
    return BW_OK;
}

static bw_status check_norm(const bw_norm *norm, ptrdiff_t n) {
    if (!norm->present || norm->kind == BW_GAIN_NONE) return BW_OK;
    if (norm->kind < 0 || norm->kind > BW_GAIN_PLUS_ONE) return BW_ERR_ARGUMENT;
    bw_status status = bw_check_matrix(&norm->gain);
    return status ? status : norm->gain.rows != 1 || norm->gain.cols != n ? BW_ERR_SHAPE : BW_OK;
}

static bw_status check_block(const bw_decoder *m, const bw_step *step, const bw_decoder_block *b, needs *all) {
    ptrdiff_t q = m->heads * m->dim, kv = m->kv_heads * m->dim;
    const bw_norm *norms[] = {&b->before_attention, &b->after_attention, &b->before_mlp, &b->after_mlp};
    bw_status status = BW_OK;
    for (int i = 0; i < 4 && !status; i++) status = check_norm(norms[i], m->hidden);
    if (!status) status = check_norm(&b->q_norm, m->norm_by_head ? m->dim : q);
    if (!status) status = check_norm(&b->k_norm, m->norm_by_head ? m->dim : kv);
    if (!status) status = check_part(&b->q, q, m->hidden, all);
    if (!status) status = check_part(&b->k, kv, m->hidden, all);
    if (!status) status = check_part(&b->v, kv, m->hidden, all);
    if (!status) status = check_part(&b->o, m->hidden, q, all);
    if (!status && b->gate.linear) status = check_part(&b->gate, m->inner, m->hidden, all);
    if (!status) status = check_part(&b->up, m->inner, m->hidden, all);
    if (!status) status = check_part(&b->down, m->hidden, m->inner, all);
    if (status) return status;
    if (b->window < 0) return BW_ERR_ARGUMENT;
    if (b->rope < -1 || b->rope >= step->n_ropes || b->room < 0 || b->room >= step->n_rooms) return BW_ERR_INDEX;
    return b->place < 0 || b->place >= step->rooms[b->room].places ? BW_ERR_INDEX : BW_OK;
}

static bw_status check_step(const bw_decoder *m, const bw_step *step) {
    if (!step->x || !step->out || step->batch < 1 || step->n_new < 1) return BW_ERR_ARGUMENT;
    if (step->batch > BW_MOST_STEP || step->n_new > BW_MOST_STEP / step->batch) return BW_ERR_SHAPE;
    if (step->n_ropes < 0 || step->n_ropes > BW_MOST_ROPES || step->n_rooms < 1) return BW_ERR_ARGUMENT;
    if ((step->n_ropes && !step->ropes) || !step->rooms) return BW_ERR_ARGUMENT;
    for (int i = 0; i < step->n_ropes; i++) {
        const bw_rope *rope = &step->ropes[i];
        if (!rope->cosine || !rope->sine) return BW_ERR_ARGUMENT;
        if (rope->n < 2 || rope->n % 2 || rope->n > m->dim) return BW_ERR_SHAPE;
    }
    for (int i = 0; i < step->n_rooms; i++) {
        const bw_room *room = &step->rooms[i];
        ptrdiff_t n = 2 * step->batch;
        if (!room->data || room->start < 0 || room->start > room->end || room->end > room->seen) return BW_ERR_ARGUMENT;
        if (room->capacity < step->n_new || room->end > room->capacity - step->n_new) return BW_ERR_SHAPE;
        if (bw_multiply(n, m->kv_heads, &n) || bw_multiply(n, m->dim * 4, &n) || bw_multiply(n, room->capacity, &n) ||
            bw_multiply(n, room->places, &n))
            return BW_ERR_OVERFLOW;
    }
    return BW_OK;
}

static bw_status check(const bw_decoder *m, const bw_step *step, needs *all) {
    const ptrdiff_t sizes[] = {m->hidden, m->inner, m->heads, m->kv_heads, m->dim};
    for (int i = 0; i < 5; i++)
        if (sizes[i] < 1 || sizes[i] > BW_MOST_VALUES / BW_MOST_HEAD) return BW_ERR_SHAPE;
    if (m->dtype != BW_F32 && m->dtype != BW_F16 && m->dtype != BW_BF16) return BW_ERR_ARGUMENT;
    if (m->activation < 0 || m->activation > BW_RELU_SQUARED || m->n_blocks < 1 || !m->blocks) return BW_ERR_ARGUMENT;
    if (m->dim > BW_MOST_HEAD || m->dim % 2 || m->heads % m->kv_heads) return BW_ERR_SHAPE;
    bw_status status = check_step(m, step);
    if (!status) status = check_norm(&m->final, m->hidden);
    for (ptrdiff_t i = 0; i < m->n_blocks && !status; i++) status = check_block(m, step, &m->blocks[i], all);
    return status;
}

/* ---- the loops ---- */

/* x = norm(h), or h itself. */
static void look(bw_decoding *d, const bw_norm *norm) {
    for (ptrdiff_t t = 0; t < d->tokens; t++) {
        float *h = d->h + t * d->hidden, *x = d->x + t * d->hidden;
        if (norm->present) bw_apply_norm(d, norm, h, d->decoder->hidden, x);
        else memcpy(x, h, (size_t)d->hidden * 4);
    }
}

/* h += scale * norm(y). */
static void add(bw_decoding *d, const bw_norm *norm) {
    const bw_decoder *m = d->decoder;
    for (ptrdiff_t t = 0; t < d->tokens; t++) {
        float *y = d->y + t * d->hidden;
        if (norm->present) bw_apply_norm(d, norm, y, m->hidden, y);
        bw_cpu()->add_row(d->h + t * d->hidden, y, m->hidden, m->residual_scale, m->dtype);
    }
}

static ptrdiff_t begin(void *context, int phase) {
    bw_decoding *d = context;
    const bw_decoder_block *b = &d->decoder->blocks[phase / BW_LOOPS];
    switch (phase % BW_LOOPS) {
    case BW_LOOP_QKV: {
        if (phase) add(d, &b[-1].after_mlp);
        look(d, &b->before_attention);
        const bw_part *parts[] = {&b->q, &b->k, &b->v};
        float *outs[] = {d->q, d->k, d->v};
        const ptrdiff_t strides[] = {d->q_width, d->kv_width, d->kv_width};
        return bw_begin_linear(d, parts, outs, strides, 3, 0, d->x, d->hidden);
    }
    case BW_LOOP_ATTENTION: return bw_begin_attention(d, b);
    case BW_LOOP_O: {
        const bw_part *part = &b->o;
        for (ptrdiff_t t = 0; t < d->tokens; t++)
            bw_cpu()->round_row(d->mixed + t * d->q_width, part->linear->cols, d->decoder->dtype);
        return bw_begin_linear(d, &part, &d->y, &d->hidden, 1, 0, d->mixed, d->q_width);
    }
    case BW_LOOP_MLP: {
        add(d, &b->after_attention);
        look(d, &b->before_mlp);
        const bw_part *both[] = {&b->gate, &b->up}, *alone = &b->up;
        float *outs[] = {d->middle, NULL};
        const ptrdiff_t strides[] = {d->inner, 0};
        return b->gate.linear ? bw_begin_linear(d, both, outs, strides, 2, 1, d->x, d->hidden)
                              : bw_begin_linear(d, &alone, outs, strides, 1, 1, d->x, d->hidden);
    }
    default: {
        const bw_part *part = &b->down;
        return bw_begin_linear(d, &part, &d->y, &d->hidden, 1, 0, d->middle, d->inner);
    }
    }
}

static void chunk(void *context, int phase, ptrdiff_t i, int worker) {
    bw_decoding *d = context;
    if (phase % BW_LOOPS == BW_LOOP_ATTENTION) bw_attention_chunk(d, &d->decoder->blocks[phase / BW_LOOPS], i, worker);
    else bw_linear_chunk(d, i, worker);
}

static void end(void *context) {
    bw_decoding *d = context;
    const bw_decoder *m = d->decoder;
    ptrdiff_t bytes = m->hidden * (m->dtype == BW_F32 ? 4 : 2);
    add(d, &m->blocks[m->n_blocks - 1].after_mlp);
    look(d, &m->final);
    for (ptrdiff_t t = 0; t < d->tokens; t++)
        bw_cpu()->store(d->x + t * d->hidden, m->hidden, m->dtype, (char *)d->step->out + t * bytes);
}

/* ---- memory ---- */

/* Room for n numbers in memory that begins at base; with base NULL only the size counts. */
static float *floats(char *base, ptrdiff_t *at, ptrdiff_t n) {
    float *p = base ? (float *)(base + *at) : NULL;
    *at += bw_aligned(n * 4);
    return p;
}

/* Carves memory into all arrays; returns how many bytes that takes, of which the workers' scratch is the end. */
static ptrdiff_t lay_out(bw_decoding *d, char *base, ptrdiff_t n_phases) {
    const bw_decoder *m = d->decoder;
    ptrdiff_t at = 0, n = d->tokens;
    d->h = floats(base, &at, n * d->hidden);
    d->x = floats(base, &at, n * d->hidden);
    d->y = floats(base, &at, n * d->hidden);
    d->q = floats(base, &at, n * d->q_width);
    d->k = floats(base, &at, n * d->kv_width);
    d->v = floats(base, &at, n * d->kv_width);
    d->queries = floats(base, &at, n * m->heads * d->dim);
    d->keys = floats(base, &at, m->kv_heads * d->dim);
    d->mixed = floats(base, &at, n * d->q_width);
    d->middle = floats(base, &at, n * d->inner);
    d->gain = floats(base, &at, most(d->hidden, d->q_width));
    d->phases = (bw_phase *)(void *)floats(base, &at, n_phases * (ptrdiff_t)sizeof(bw_phase) / 4);
    d->prepared = (char *)floats(base, &at, BW_MOST_PARTS * d->prepared_bytes / 4);
    d->scratch = (char *)floats(base, &at, d->n_workers * d->scratch_bytes / 4);
    return at;
}

static void read_tokens(bw_decoding *d) {
    const bw_decoder *m = d->decoder;
    const bw_matrix x = {d->step->x, d->tokens, m->hidden, m->hidden, 1, m->dtype};
    for (ptrdiff_t t = 0; t < d->tokens; t++) bw_cpu()->load_row(&x, t, 0, m->hidden, d->h + t * d->hidden);
}

static const bw_phase_fns loops = {begin, chunk, end};

bw_status bw_decode(const bw_decoder *m, const bw_step *step) {
    needs all = {0};
    bw_status status = check(m, step, &all);
    if (status) return status;
    ptrdiff_t longest = 0, group = m->heads / m->kv_heads, n_phases = m->n_blocks * BW_LOOPS;
    for (int i = 0; i < step->n_rooms; i++) longest = most(longest, step->rooms[i].end - step->rooms[i].start);
    bw_decoding d = {.decoder = m, .step = step, .tokens = step->batch * step->n_new};
    d.hidden = bw_whole_units(m->hidden);
    d.inner = bw_whole_units(m->inner);
    d.q_width = bw_whole_units(m->heads * m->dim);
    d.kv_width = bw_whole_units(m->kv_heads * m->dim);
    d.dim = (m->dim + 15) / 16 * 16;
    d.n_workers = bw_get_num_threads();
    d.prepared_bytes = bw_aligned(d.tokens * all.token);
    d.score_stride = bw_whole_units(longest + step->n_new);
    d.scratch_bytes = bw_aligned(most(all.scratch, (bw_whole_units(group) + group * d.score_stride) * 4));
    ptrdiff_t bytes = lay_out(&d, NULL, n_phases);
    char *memory = bw_alloc(1, bytes);
    if (!memory) return BW_ERR_MEMORY;
    memset(memory, 0, (size_t)(bytes - d.n_workers * d.scratch_bytes));
    lay_out(&d, memory, n_phases);
    read_tokens(&d);
    status = bw_run_phases(d.n_workers, (int)n_phases, d.phases, &loops, &d);
    bw_free(memory);
    return status ? status : (bw_status)atomic_load(&d.status);
}
