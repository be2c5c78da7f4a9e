/* Arguments of a decoder's step: nothing is touched before all of them fit together. */
#include "decoder.h"
#include "scheme.h"

#define MOST (BW_MOST_VALUES / BW_MOST_HEAD)

static ptrdiff_t most(ptrdiff_t a, ptrdiff_t b) {
    return a > b ? a : b;
}

static bw_status check_part(const bw_part *part, ptrdiff_t rows, ptrdiff_t cols, bw_needs *all) {
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

static bw_status check_mlp(const bw_decoder *m, const bw_mlp *mlp, int pairs, bw_needs *all) {
    ptrdiff_t rows = mlp->up.rows, inner = pairs ? rows / 2 : rows;
    if (pairs ? mlp->gate.linear != NULL : m->activation == BW_CLAMPED && !mlp->gate.linear) return BW_ERR_ARGUMENT;
    if (inner < 1 || inner > MOST || (pairs && rows % 2)) return BW_ERR_SHAPE;
    bw_status status = mlp->gate.linear ? check_part(&mlp->gate, inner, m->hidden, all) : BW_OK;
    if (!status) status = check_part(&mlp->up, rows, m->hidden, all);
    if (!status) status = check_part(&mlp->down, m->hidden, inner, all);
    all->inner = most(all->inner, inner);
    return status;
}

static bw_status check_mixture(const bw_decoder *m, const bw_decoder_block *b, bw_needs *all) {
    const bw_mixture *mixture = &b->mixture;
    const bw_routing *r = &mixture->routing;
    bw_status status = bw_route(r, NULL, 0, NULL, NULL);
    if (status || !mixture->experts) return BW_ERR_ARGUMENT;
    if (!b->mlp.up.linear && (b->mlp.gate.linear || mixture->shared_gate.linear)) return BW_ERR_ARGUMENT;
    status = check_part(&mixture->router, r->n, m->hidden, all);
    if (!status && mixture->shared_gate.linear) status = check_part(&mixture->shared_gate, 1, m->hidden, all);
    for (ptrdiff_t i = 0; i < r->n && !status; i++) status = check_mlp(m, &mixture->experts[i], mixture->pairs, all);
    all->experts = most(all->experts, r->n);
    all->chosen = most(all->chosen, r->chosen);
    return status;
}

static bw_status check_block(const bw_decoder *m, const bw_step *step, const bw_decoder_block *b, bw_needs *all) {
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
    if (!status && (b->mlp.up.linear || !b->mixture.routing.n)) status = check_mlp(m, &b->mlp, 0, all);
    if (!status && b->mixture.routing.n) status = check_mixture(m, b, all);
    if (status) return status;
    if (b->sinks.data) {
        status = m->attention_cap > 0 ? BW_ERR_ARGUMENT : bw_check_matrix(&b->sinks);
        if (!status && (b->sinks.rows != 1 || b->sinks.cols != m->heads)) status = BW_ERR_SHAPE;
        if (status) return status;
    }
    all->n_phases += b->mixture.routing.n ? 6 : 5;
    if (b->window < 0) return BW_ERR_ARGUMENT;
    if (b->rope < -1 || b->rope >= step->n_ropes || b->room < 0 || b->room >= step->n_rooms) return BW_ERR_INDEX;
    return b->place < 0 || b->place >= step->rooms[b->room].places ? BW_ERR_INDEX : BW_OK;
}

static bw_status check_tokens(const bw_decoder *m, const bw_step *step) {
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

/* Whether a token's experts exist, each only once: there is room for every expert to work on every token, not more. */
static int are_experts(const int64_t *chosen, ptrdiff_t n, ptrdiff_t experts) {
    for (ptrdiff_t i = 0; i < n; i++) {
        if (chosen[i] < 0 || chosen[i] >= experts) return 0;
        for (ptrdiff_t j = 0; j < i; j++)
            if (chosen[j] == chosen[i]) return 0;
    }
    return 1;
}

/* Experts that a step names: as many as its tokens choose. */
static bw_status check_given(const bw_decoder *m, const bw_step *step) {
    const int64_t *given = step->experts;
    ptrdiff_t left = step->n_experts;
    if (!given) return BW_OK;
    for (ptrdiff_t i = 0; i < m->n_blocks; i++) {
        const bw_routing *r = &m->blocks[i].mixture.routing;
        ptrdiff_t n = r->n ? step->batch * step->n_new * r->chosen : 0;
        if (n > left) return BW_ERR_SHAPE;
        for (left -= n; n > 0; n -= r->chosen, given += r->chosen)
            if (!are_experts(given, r->chosen, r->n)) return BW_ERR_INDEX;
    }
    return left ? BW_ERR_SHAPE : BW_OK;
}

bw_status bw_check_step(const bw_decoder *m, const bw_step *step, bw_needs *all) {
    const ptrdiff_t sizes[] = {m->hidden, m->heads, m->kv_heads, m->dim};
    *all = (bw_needs){0};
    for (int i = 0; i < 4; i++)
        if (sizes[i] < 1 || sizes[i] > MOST) return BW_ERR_SHAPE;
    if (m->heads > MOST / m->dim) return BW_ERR_SHAPE;
    if (m->dtype != BW_F32 && m->dtype != BW_F16 && m->dtype != BW_BF16) return BW_ERR_ARGUMENT;
    if (m->activation < 0 || m->activation > BW_CLAMPED || m->n_blocks < 1 || !m->blocks) return BW_ERR_ARGUMENT;
    if (m->dim > BW_MOST_HEAD || m->dim % 2 || m->heads % m->kv_heads) return BW_ERR_SHAPE;
    bw_status status = check_tokens(m, step);
    if (!status) status = check_norm(&m->final, m->hidden);
    for (ptrdiff_t i = 0; i < m->n_blocks && !status; i++) status = check_block(m, step, &m->blocks[i], all);
    return status ? status : check_given(m, step);
}
