/* A hostile step of a decoder: a legal one is made up, and in half of the calls one of its numbers is spoiled. */
#include <string.h>

#include "../../csrc/core/bitween.h"
#include "calls.h"
#include "made.h"
#include "memory.h"

enum { MOST_BLOCKS = 3, MOST_TABLES = 2, MOST_ROOMS = 2, EXPERTS = 3 };
enum { Q = 0, KV, O, GATE, DOWN, PAIRS, ROUTER, SHARE, LAYERS };

typedef struct {
    bw_decoder decoder;
    bw_decoder_block blocks[MOST_BLOCKS];
    bw_linear layers[LAYERS];
    bw_mlp experts[EXPERTS];
    ptrdiff_t inner;
    bw_step step;
    bw_rope ropes[MOST_TABLES];
    bw_room rooms[MOST_ROOMS];
    size_t room_bytes[MOST_ROOMS];
    char *before[MOST_ROOMS]; /* the rooms' bytes before the call */
    int64_t *padding, *chosen;
} made_step;

static bw_linear draw_linear(tape *t, ptrdiff_t rows, ptrdiff_t cols) {
    bw_linear l = {.kind = (bw_linear_kind)draw(t, 3), .mode = (bw_mode)draw(t, 3), .rows = rows, .cols = cols};
    if (draw(t, 2)) l.bias = draw_view(t, 1, rows);
    if (l.kind == BW_PACKED) {
        bw_layout layout;
        int too_large;
        l.packed = room_for(draw_scheme(t), rows, cols, &layout, &too_large);
        fill_stored(t, &l.packed, &layout);
    } else if (l.kind == BW_TRELLIS) {
        ptrdiff_t n_bytes;
        l.trellis = trellis_room_for(t, rows, cols, 0, &n_bytes);
        fill_trellis(t, &l.trellis, n_bytes);
    } else {
        l.plain = draw_view(t, rows, cols);
        if (draw(t, 4)) { /* the one order that is taken; it needs no more memory than any other */
            l.plain = (bw_matrix){take((size_t)(rows * cols) * 4), rows, cols, cols, 1, BW_F32};
            fill_floats(t, (void *)l.plain.data, rows * cols, BW_F32);
        }
    }
    return l;
}

static bw_norm draw_norm(tape *t, const bw_matrix *gain) {
    return (bw_norm){(int)draw(t, 2), (bw_gain)draw(t, 4), 1e-5f, *gain};
}

static void draw_blocks(tape *t, made_step *m) {
    bw_decoder *d = &m->decoder;
    ptrdiff_t q = d->heads * d->dim, kv = d->kv_heads * d->dim;
    ptrdiff_t inner = m->inner, chosen = 1 + (ptrdiff_t)draw(t, EXPERTS);
    const ptrdiff_t shapes[LAYERS][2] = {{q, d->hidden},       {kv, d->hidden},    {d->hidden, q},
                                         {inner, d->hidden},   {d->hidden, inner}, {2 * inner, d->hidden},
                                         {EXPERTS, d->hidden}, {1, d->hidden}};
    for (int i = 0; i < LAYERS; i++) m->layers[i] = draw_linear(t, shapes[i][0], shapes[i][1]);
    bw_matrix gain = draw_view(t, 1, d->hidden), of_q = draw_view(t, 1, d->norm_by_head ? d->dim : q),
              of_k = draw_view(t, 1, d->norm_by_head ? d->dim : kv), sinks = draw_view(t, 1, d->heads);
    const bw_mlp mlp = {{draw(t, 4) ? &m->layers[GATE] : NULL, 0, inner},
                        {&m->layers[GATE], 0, inner},
                        {&m->layers[DOWN], 0, d->hidden}};
    int pairs = (int)draw(t, 2);
    for (int e = 0; e < EXPERTS; e++) {
        m->experts[e] = mlp;
        if (pairs) m->experts[e].gate = (bw_part){0}, m->experts[e].up = (bw_part){&m->layers[PAIRS], 0, 2 * inner};
    }
    bw_routing routing = {EXPERTS, chosen, (int)draw(t, 2), (int)draw(t, 2), (bw_dtype)draw(t, 3)};
    bw_mixture mixture = {
        routing, {&m->layers[ROUTER], 0, EXPERTS}, {draw(t, 2) ? &m->layers[SHARE] : NULL, 0, 1}, m->experts, pairs};
    for (ptrdiff_t i = 0; i < d->n_blocks; i++) {
        bw_decoder_block *b = &m->blocks[i];
        *b = (bw_decoder_block){.q = {&m->layers[Q], 0, q},
                                .k = {&m->layers[KV], 0, kv},
                                .v = {&m->layers[KV], 0, kv},
                                .o = {&m->layers[O], 0, d->hidden},
                                .mlp = mlp,
                                .before_attention = draw_norm(t, &gain),
                                .q_norm = draw_norm(t, &of_q),
                                .k_norm = draw_norm(t, &of_k),
                                .after_attention = draw_norm(t, &gain),
                                .before_mlp = draw_norm(t, &gain),
                                .after_mlp = draw_norm(t, &gain),
                                .window = draw(t, 2) ? 0 : 1 + (ptrdiff_t)draw(t, 12),
                                .rope = (int)draw(t, MOST_TABLES + 1) - 1,
                                .room = (int)draw(t, MOST_ROOMS),
                                .place = (ptrdiff_t)draw(t, MOST_BLOCKS)};
        if (draw(t, 2)) b->mixture = mixture;
        if (draw(t, 3) == 0) b->sinks = sinks;
        if (b->mixture.routing.n && draw(t, 2)) b->mlp = (bw_mlp){0};
    }
    d->blocks = m->blocks;
    d->final = draw_norm(t, &gain);
}

static void draw_step(tape *t, made_step *m) {
    const bw_decoder *d = &m->decoder;
    bw_step *s = &m->step;
    s->batch = 1 + (ptrdiff_t)draw(t, 4);
    s->n_new = 1 + (ptrdiff_t)draw(t, 4);
    ptrdiff_t tokens = s->batch * s->n_new;
    size_t bytes = (size_t)(tokens * d->hidden) * width_of(d->dtype);
    void *x = take(bytes);
    fill_floats(t, x, tokens * d->hidden, d->dtype);
    s->x = x;
    s->out = take(bytes);
    memset(s->out, 0x5a, bytes);
    for (int i = 0; i < MOST_TABLES; i++) {
        ptrdiff_t n = 2 + 2 * (ptrdiff_t)draw(t, (unsigned)d->dim / 2);
        float *tables[2] = {take((size_t)(tokens * n) * 4), take((size_t)(tokens * n) * 4)};
        for (int k = 0; k < 2; k++) fill_floats(t, tables[k], tokens * n, BW_F32);
        m->ropes[i] = (bw_rope){tables[0], tables[1], n, (int)draw(t, 2)};
    }
    for (int i = 0; i < MOST_ROOMS; i++) {
        ptrdiff_t start = (ptrdiff_t)draw(t, 4), end = start + (ptrdiff_t)draw(t, 40);
        ptrdiff_t capacity = end + s->n_new + (ptrdiff_t)draw(t, 3);
        ptrdiff_t n = MOST_BLOCKS * 2 * s->batch * d->kv_heads * capacity * d->dim;
        m->room_bytes[i] = (size_t)n * width_of(d->dtype);
        m->rooms[i] =
            (bw_room){take(m->room_bytes[i]), MOST_BLOCKS, capacity, start, end, end + (ptrdiff_t)draw(t, 20)};
        fill_floats(t, m->rooms[i].data, n, d->dtype);
        m->before[i] = take(m->room_bytes[i]);
        memcpy(m->before[i], m->rooms[i].data, m->room_bytes[i]);
    }
    if (draw(t, 2)) s->padding = m->padding = take((size_t)s->batch * 8);
    for (ptrdiff_t i = 0; m->padding && i < s->batch; i++) m->padding[i] = (int64_t)draw(t, 70) - 3;
    ptrdiff_t mixtures = 0, chosen = 0;
    for (ptrdiff_t i = 0; i < d->n_blocks; i++)
        if (m->blocks[i].mixture.routing.n) mixtures++, chosen = m->blocks[i].mixture.routing.chosen;
    if (mixtures && draw(t, 2)) {
        s->n_experts = mixtures * tokens * chosen;
        s->experts = m->chosen = take((size_t)s->n_experts * 8);
        /* of a token mostly different ones */
        for (ptrdiff_t i = 0; i < s->n_experts; i++) m->chosen[i] = (i % chosen + (int64_t)draw(t, 40) / 39) % EXPERTS;
    }
    s->ropes = m->ropes, s->n_ropes = MOST_TABLES;
    s->rooms = m->rooms, s->n_rooms = MOST_ROOMS;
}

/* Spoils one number, pointer or kind. What would claim more memory than there is without being beyond all sizes is left
 * out: nobody can see that. */
static void spoil(tape *t, made_step *m) {
    static const ptrdiff_t hostile[] = {-1, 0, PTRDIFF_MIN, PTRDIFF_MAX, PTRDIFF_MAX / 2, (ptrdiff_t)1 << 62};
    ptrdiff_t to = hostile[draw(t, 6)];
    bw_decoder *d = &m->decoder;
    bw_decoder_block *b = &m->blocks[draw(t, (unsigned)d->n_blocks)];
    bw_linear *l = &m->layers[draw(t, LAYERS)];
    bw_room *room = &m->rooms[draw(t, MOST_ROOMS)];
    bw_rope *rope = &m->ropes[draw(t, MOST_TABLES)];
    bw_part *parts[] = {&b->q,
                        &b->k,
                        &b->v,
                        &b->o,
                        &b->mlp.gate,
                        &b->mlp.up,
                        &b->mlp.down,
                        &b->mixture.router,
                        &b->mixture.shared_gate},
            *part = parts[draw(t, 9)];
    bw_routing *routing = &b->mixture.routing;
    ptrdiff_t *sizes[] = {&d->hidden,      &routing->n,      &d->heads,        &d->kv_heads,     &d->dim,
                          &b->window,      &b->place,        &part->first,     &part->rows,      &l->rows,
                          &l->cols,        &room->places,    &room->capacity,  &room->start,     &room->end,
                          &room->seen,     &rope->n,         &m->step.batch,   &m->step.n_new,   &l->packed.rows,
                          &l->packed.cols, &l->trellis.rows, &l->trellis.cols, &routing->chosen, &m->step.n_experts};
    enum { SIZES = sizeof sizes / sizeof *sizes };
    int *numbers[] = {&b->rope, &b->room};
    unsigned which = draw(t, SIZES + 19);
    if (which < SIZES) *sizes[which] = to;
    else switch (which - SIZES) {
        case 0: d->n_blocks = to > 0 ? 0 : to; break;
        case 1: *numbers[draw(t, 2)] = draw(t, 2) ? 7 : -2 - (int)draw(t, 2) * (INT32_MAX - 2); break;
        case 2: m->step.n_ropes = draw(t, 2) ? -1 : BW_MOST_ROPES + 1; break;
        case 3: m->step.n_rooms = -(int)draw(t, 2); break;
        case 4: d->dtype = (bw_dtype)(3 + draw(t, 2)); break;
        case 5: d->activation = (bw_activation)(6 + draw(t, 9)); break;
        case 6: b->q_norm = (bw_norm){1, (bw_gain)(4 + draw(t, 3)), 0, b->q_norm.gain}; break;
        case 7: l->mode = (bw_mode)(3 + draw(t, 3)); break;
        case 8: l->kind = (bw_linear_kind)draw(t, 5); break;
        case 9: m->step.x = NULL; break;
        case 10: m->step.out = NULL; break;
        case 11: room->data = NULL; break;
        case 12: rope->sine = NULL; break;
        case 13: part->linear = NULL; break;
        case 14: d->blocks = NULL; break;
        case 15: b->mixture.experts = NULL; break;
        case 16: routing->dtype = (bw_dtype)(3 + draw(t, 2)); break;
        case 17:
            if (m->chosen) m->chosen[0] = draw(t, 2) ? -1 : EXPERTS;
            break;
        default:
            if (m->padding) m->padding[0] = draw(t, 2) ? INT64_MIN : INT64_MAX;
            break;
        }
}

/* Whether the rooms of a legal step hold what they held, but for the rows that `rooms`, as they were given to the core,
 * have for new tokens; those too when `wholly`. */
static int untouched(const made_step *m, const bw_room *rooms, int wholly) {
    ptrdiff_t row_bytes = m->decoder.dim * (ptrdiff_t)width_of(m->decoder.dtype);
    for (int i = 0; i < MOST_ROOMS; i++) {
        ptrdiff_t rows = (ptrdiff_t)m->room_bytes[i] / row_bytes;
        for (ptrdiff_t r = 0; r < rows; r++) {
            ptrdiff_t at = r % m->rooms[i].capacity;
            if (!wholly && at >= rooms[i].end && at - rooms[i].end < m->step.n_new) continue;
            if (memcmp(m->rooms[i].data + r * row_bytes, m->before[i] + r * row_bytes, (size_t)row_bytes)) return 0;
        }
    }
    return 1;
}

int call_decode(tape *t, int unused) {
    (void)unused;
    /* A decoder takes more bytes than a call has: it is made of a number, which they are. */
    uint64_t random = (uint64_t)draw(t, 1u << 24) * 0x9e3779b97f4a7c15u + 1;
    uint8_t bytes[2048];
    make_up(&random, bytes, sizeof bytes);
    tape own = {bytes, bytes + sizeof bytes};
    t = &own;
    made_step m = {.decoder = {.n_blocks = 1 + (ptrdiff_t)draw(t, MOST_BLOCKS),
                               .hidden = 1 + (ptrdiff_t)draw(t, 140),
                               .dim = 2 + 2 * (ptrdiff_t)draw(t, 12),
                               .kv_heads = 1 + (ptrdiff_t)draw(t, 3),
                               .norm_by_head = (int)draw(t, 2),
                               .attention_scale = 0.3f,
                               .attention_cap = draw(t, 2) ? 0 : 5,
                               .residual_scale = draw(t, 2) ? 1 : 0.5f,
                               .activation = (bw_activation)draw(t, 6),
                               .alpha = 1.5f,
                               .limit = 4,
                               .dtype = (bw_dtype)draw(t, 3)}};
    m.inner = 1 + (ptrdiff_t)draw(t, 140);
    m.decoder.heads = m.decoder.kv_heads * (1 + (ptrdiff_t)draw(t, 4));
    draw_blocks(t, &m);
    draw_step(t, &m);
    const made_step legal = m;
    const unsigned char *out = m.step.out;
    if (draw(t, 2)) spoil(t, &m);
    bw_status status = bw_decode(&m.decoder, &m.step);
    if (!untouched(&legal, m.rooms, refused(status) || status == BW_ERR_INDEX || status == BW_ERR_MEMORY))
        broken("a step writes the rows of its own tokens, a refused one nothing");
    size_t bytes_out =
        (size_t)(legal.step.batch * legal.step.n_new * legal.decoder.hidden) * width_of(legal.decoder.dtype);
    for (size_t i = 0; (refused(status) || status == BW_ERR_INDEX) && i < bytes_out; i++)
        if (out[i] != 0x5a) broken("a refused call writes nothing");
    return status;
}
