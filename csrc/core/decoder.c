/* A step of a decoder: all blocks, one parallel region. */
#include "decoder.h"

#include <string.h>

#include "alloc.h"
#include "cpu.h"
#include "matmul.h"
#include "parallel.h"

static ptrdiff_t most(ptrdiff_t a, ptrdiff_t b) {
    return a > b ? a : b;
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

/* h += what the block's MLP said. */
static void add_mlp(bw_decoding *d, const bw_decoder_block *b) {
    if (b->mixture.routing.n) bw_mix_experts(d, b);
    add(d, &b->after_mlp);
}

static ptrdiff_t begin(void *context, int phase) {
    bw_decoding *d = context;
    const bw_decoder_block *b = d->loops[phase].block;
    d->n_works = d->activated = 0;
    d->used_bytes = 0;
    switch (d->loops[phase].kind) {
    case BW_LOOP_QKV:
        if (phase) add_mlp(d, b - 1);
        look(d, &b->before_attention);
        bw_add_work(d, &b->q, d->x, d->hidden, NULL, d->tokens, d->q, d->q_width);
        bw_add_work(d, &b->k, d->x, d->hidden, NULL, d->tokens, d->k, d->kv_width);
        bw_add_work(d, &b->v, d->x, d->hidden, NULL, d->tokens, d->v, d->kv_width);
        break;
    case BW_LOOP_ATTENTION: return bw_begin_attention(d, b);
    case BW_LOOP_O:
        for (ptrdiff_t t = 0; t < d->tokens; t++)
            bw_cpu()->round_row(d->mixed + t * d->q_width, b->o.linear->cols, d->decoder->dtype);
        bw_add_work(d, &b->o, d->mixed, d->q_width, NULL, d->tokens, d->y, d->hidden);
        break;
    case BW_LOOP_MLP:
    case BW_LOOP_ROUTER:
        add(d, &b->after_attention);
        look(d, &b->before_mlp);
        if (d->loops[phase].kind == BW_LOOP_ROUTER) bw_add_router(d, b);
        else bw_add_mlp(d, &b->mlp, 0, NULL, d->tokens, d->middle);
        break;
    case BW_LOOP_DOWN: bw_add_down(d, &b->mlp, d->tokens, d->middle, d->y); break;
    case BW_LOOP_EXPERTS: bw_add_experts(d, b); break;
    case BW_LOOP_EXPERTS_DOWN: bw_add_experts_down(d, b); break;
    }
    return bw_begin_works(d);
}

static void chunk(void *context, int phase, ptrdiff_t i, int worker) {
    bw_decoding *d = context;
    if (d->loops[phase].kind == BW_LOOP_ATTENTION) bw_attention_chunk(d, d->loops[phase].block, i, worker);
    else bw_linear_chunk(d, i, worker);
}

static void end(void *context) {
    bw_decoding *d = context;
    const bw_decoder *m = d->decoder;
    ptrdiff_t bytes = m->hidden * (m->dtype == BW_F32 ? 4 : 2);
    add_mlp(d, &m->blocks[m->n_blocks - 1]);
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

static void *words(char *base, ptrdiff_t *at, ptrdiff_t n) {
    return floats(base, at, 2 * n);
}

/* Slots: a token's places with its experts; `rows` of them and of the block's own MLP. */
static void lay_out_choice(bw_decoding *d, char *base, ptrdiff_t *at, ptrdiff_t slots, ptrdiff_t rows) {
    bw_choice *c = &d->choice;
    if (!c->most_of) return;
    c->logits = floats(base, at, d->tokens * c->width);
    c->shared = floats(base, at, d->tokens * BW_UNIT);
    c->weights = floats(base, at, slots);
    c->experts = words(base, at, slots);
    c->slots = words(base, at, slots);
    c->tokens = words(base, at, slots);
    c->firsts = words(base, at, c->most_of + 1);
    c->outs = floats(base, at, rows * d->hidden);
}

/* Carves memory into all arrays; returns how many bytes that takes, of which the workers' scratch is the end. */
static ptrdiff_t lay_out(bw_decoding *d, char *base, ptrdiff_t n_phases) {
    const bw_decoder *m = d->decoder;
    ptrdiff_t at = 0, n = d->tokens, slots = n * d->choice.most, rows = slots + n;
    ptrdiff_t mlps = (slots < d->choice.most_of ? slots : d->choice.most_of) + 1, works = most(2 * mlps, BW_MOST_PARTS);
    d->h = floats(base, &at, n * d->hidden);
    d->x = floats(base, &at, n * d->hidden);
    d->y = floats(base, &at, n * d->hidden);
    d->q = floats(base, &at, n * d->q_width);
    d->k = floats(base, &at, n * d->kv_width);
    d->v = floats(base, &at, n * d->kv_width);
    d->queries = floats(base, &at, n * m->heads * d->dim);
    d->keys = floats(base, &at, m->kv_heads * d->dim);
    d->mixed = floats(base, &at, n * d->q_width);
    d->middle = floats(base, &at, rows * d->inner);
    d->gain = floats(base, &at, most(d->hidden, d->q_width));
    lay_out_choice(d, base, &at, slots, rows);
    d->phases = (bw_phase *)(void *)floats(base, &at, n_phases * (ptrdiff_t)sizeof(bw_phase) / 4);
    d->loops = (bw_loop *)(void *)floats(base, &at, n_phases * (ptrdiff_t)sizeof(bw_loop) / 4);
    d->works = (bw_work *)(void *)floats(base, &at, works * (ptrdiff_t)sizeof(bw_work) / 4);
    d->prepared = (char *)floats(base, &at, most(2 * rows, BW_MOST_PARTS * n) * d->prepared_bytes / 4);
    d->scratch = (char *)floats(base, &at, d->n_workers * d->scratch_bytes / 4);
    return at;
}

static void read_tokens(bw_decoding *d) {
    const bw_decoder *m = d->decoder;
    const bw_matrix x = {d->step->x, d->tokens, m->hidden, m->hidden, 1, m->dtype};
    for (ptrdiff_t t = 0; t < d->tokens; t++) bw_cpu()->load_row(&x, t, 0, m->hidden, d->h + t * d->hidden);
}

static const bw_phase_fns loops = {begin, chunk, end};

static void list_loops(bw_decoding *d) {
    bw_loop *loop = d->loops;
    for (ptrdiff_t i = 0; i < d->decoder->n_blocks; i++) {
        const bw_decoder_block *b = &d->decoder->blocks[i];
        for (bw_loop_kind kind = BW_LOOP_QKV; kind <= BW_LOOP_O; kind++) *loop++ = (bw_loop){b, kind};
        bw_loop_kind first = b->mixture.routing.n ? BW_LOOP_ROUTER : BW_LOOP_MLP,
                     last = b->mixture.routing.n ? BW_LOOP_EXPERTS_DOWN : BW_LOOP_DOWN;
        for (bw_loop_kind kind = first; kind <= last; kind++) *loop++ = (bw_loop){b, kind};
    }
}

bw_status bw_decode(const bw_decoder *m, const bw_step *step) {
    bw_needs all;
    bw_status status = bw_check_step(m, step, &all);
    if (status) return status;
    ptrdiff_t longest = 0, group = m->heads / m->kv_heads;
    for (int i = 0; i < step->n_rooms; i++) longest = most(longest, step->rooms[i].end - step->rooms[i].start);
    bw_decoding d = {.decoder = m, .step = step, .tokens = step->batch * step->n_new};
    d.hidden = bw_whole_units(m->hidden);
    d.inner = bw_whole_units(all.inner);
    d.q_width = bw_whole_units(m->heads * m->dim);
    d.kv_width = bw_whole_units(m->kv_heads * m->dim);
    d.dim = (m->dim + 15) / 16 * 16;
    d.choice.width = bw_whole_units(all.experts);
    d.choice.most = all.chosen;
    d.choice.most_of = all.experts;
    d.choice.given = step->experts;
    d.n_workers = bw_get_num_threads();
    d.prepared_bytes = bw_aligned(all.token);
    d.score_stride = bw_whole_units(longest + step->n_new + 1);
    d.scratch_bytes = bw_aligned(most(all.scratch, (bw_whole_units(group) + group * d.score_stride) * 4));
    ptrdiff_t bytes = lay_out(&d, NULL, all.n_phases);
    char *memory = bw_alloc(1, bytes);
    if (!memory) return BW_ERR_MEMORY;
    memset(memory, 0, (size_t)(bytes - d.n_workers * d.scratch_bytes));
    lay_out(&d, memory, all.n_phases);
    list_loops(&d);
    read_tokens(&d);
    status = bw_run_phases(d.n_workers, (int)all.n_phases, d.phases, &loops, &d);
    bw_free(memory);
    return status ? status : (bw_status)atomic_load(&d.status);
}
