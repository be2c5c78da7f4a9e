/* decoder, decode: a decoder is described once, and then takes steps. */
#include "boundary.h"

enum { NORMS = 6, VIEWS = NORMS + 1, PARTS = 7, MOST_ROOMS = 8 };

static const char capsule_name[] = "bitween.decoder";

/* A described decoder and what keeps its memory alive. */
typedef struct {
    bw_decoder core;
    bw_linear *linears;
    bw_linear_views *linear_views;
    Py_ssize_t n_linears;
    bw_decoder_block *blocks;
    bw_mlp **experts; /* (blocks) */
    bw_view *gains;   /* (blocks, VIEWS), the last one of sinks; then the final one */
    Py_ssize_t n_blocks;
} held_decoder;

static void release(held_decoder *d) {
    if (!d) return;
    for (Py_ssize_t i = 0; d->linear_views && i < d->n_linears; i++) bw_linear_release(&d->linear_views[i]);
    for (Py_ssize_t i = 0; d->gains && i < d->n_blocks * VIEWS + 1; i++) bw_view_release(&d->gains[i]);
    for (Py_ssize_t i = 0; d->experts && i < d->n_blocks; i++) PyMem_Free(d->experts[i]);
    PyMem_Free(d->linears);
    PyMem_Free(d->linear_views);
    PyMem_Free(d->experts);
    PyMem_Free(d->blocks);
    PyMem_Free(d->gains);
    PyMem_Free(d);
}

static void destroy(PyObject *capsule) {
    release(PyCapsule_GetPointer(capsule, capsule_name));
}

/* mixture: None or (router, shared_gate, experts, chosen, over_all, divided, pairs, dtype) */
static int acquire_mixture(held_decoder *d, PyObject *mixture, bw_mlp **experts, bw_mixture *out) {
    int64_t chosen = 0, dtype = 0;
    if (mixture == Py_None) return 0;
    if (bw_expect_tuple("mixture", mixture, 8)) return -1;
    PyObject *all = PyTuple_GetItem(mixture, 2);
    if (bw_part_of(PyTuple_GetItem(mixture, 0), d->linears, d->n_linears, &out->router) ||
        bw_part_of(PyTuple_GetItem(mixture, 1), d->linears, d->n_linears, &out->shared_gate) ||
        bw_expect_tuple("experts", all, -1) || bw_expect_range("experts", PyTuple_Size(all), 1, BW_MOST_EXPERTS) ||
        bw_arg_int("chosen", PyTuple_GetItem(mixture, 3), 1, BW_MOST_CHOSEN, &chosen) ||
        bw_arg_flag("over_all", PyTuple_GetItem(mixture, 4), &out->routing.over_all) ||
        bw_arg_flag("divided", PyTuple_GetItem(mixture, 5), &out->routing.divided) ||
        bw_arg_flag("pairs", PyTuple_GetItem(mixture, 6), &out->pairs) ||
        bw_arg_int("dtype", PyTuple_GetItem(mixture, 7), BW_F32, BW_BF16, &dtype))
        return -1;
    out->routing.n = (ptrdiff_t)PyTuple_Size(all);
    out->routing.chosen = (ptrdiff_t)chosen;
    out->routing.dtype = (bw_dtype)dtype;
    out->experts = *experts = PyMem_Calloc((size_t)out->routing.n, sizeof **experts);
    if (!*experts) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(all); i++) {
        PyObject *parts = PyTuple_GetItem(all, i);
        bw_part *each[] = {&(*experts)[i].gate, &(*experts)[i].up, &(*experts)[i].down};
        if (bw_expect_tuple("experts", parts, 3)) return -1;
        for (int k = 0; k < 3; k++)
            if (bw_part_of(PyTuple_GetItem(parts, k), d->linears, d->n_linears, each[k])) return -1;
    }
    return 0;
}

/* block: (parts, norms, window, rope, room, place, mixture, sinks) */
static int acquire_block(held_decoder *d, PyObject *block, bw_view *gains, bw_mlp **experts, bw_decoder_block *out) {
    int64_t window = 0, rope = 0, room = 0, place = 0;
    if (bw_expect_tuple("blocks", block, 8)) return -1;
    PyObject *parts = PyTuple_GetItem(block, 0), *norms = PyTuple_GetItem(block, 1);
    if (bw_expect_tuple("parts", parts, PARTS) || bw_expect_tuple("norms", norms, NORMS) ||
        bw_arg_int("window", PyTuple_GetItem(block, 2), 0, PTRDIFF_MAX, &window) ||
        bw_arg_int("rope", PyTuple_GetItem(block, 3), -1, BW_MOST_ROPES - 1, &rope) ||
        bw_arg_int("room", PyTuple_GetItem(block, 4), 0, MOST_ROOMS - 1, &room) ||
        bw_arg_int("place", PyTuple_GetItem(block, 5), 0, INT32_MAX, &place))
        return -1;
    out->window = (ptrdiff_t)window;
    out->rope = (int)rope;
    out->room = (int)room;
    out->place = (ptrdiff_t)place;
    bw_part *each[PARTS] = {&out->q, &out->k, &out->v, &out->o, &out->mlp.gate, &out->mlp.up, &out->mlp.down};
    for (int i = 0; i < PARTS; i++)
        if (bw_part_of(PyTuple_GetItem(parts, i), d->linears, d->n_linears, each[i])) return -1;
    bw_norm *all[NORMS] = {&out->before_attention, &out->q_norm,     &out->k_norm,
                           &out->after_attention,  &out->before_mlp, &out->after_mlp};
    for (int i = 0; i < NORMS; i++)
        if (bw_norm_acquire(PyTuple_GetItem(norms, i), &gains[i], all[i])) return -1;
    PyObject *sinks = PyTuple_GetItem(block, 7);
    if (sinks != Py_None && bw_vector_acquire("sinks", sinks, &gains[NORMS], &out->sinks)) return -1;
    return acquire_mixture(d, PyTuple_GetItem(block, 6), experts, &out->mixture);
}

/* sizes: (hidden, heads, kv_heads, dim, norm_by_head, attention_scale, attention_cap, residual_scale, activation,
 * alpha, limit, dtype) */
static int read_sizes(PyObject *sizes, bw_decoder *core) {
    int64_t v[4] = {0}, activation = 0, dtype = 0;
    static const char *const names[] = {"hidden", "heads", "kv_heads", "dim"};
    double scale = 0, cap = 0, residual = 0, alpha = 0, limit = 0;
    if (bw_expect_tuple("sizes", sizes, 12)) return -1;
    for (int i = 0; i < 4; i++)
        if (bw_arg_int(names[i], PyTuple_GetItem(sizes, i), 1, INT32_MAX, &v[i])) return -1;
    if (bw_arg_flag("norm_by_head", PyTuple_GetItem(sizes, 4), &core->norm_by_head) ||
        bw_arg_float("attention_scale", PyTuple_GetItem(sizes, 5), -1e30, 1e30, &scale) ||
        bw_arg_float("attention_cap", PyTuple_GetItem(sizes, 6), 0, 1e30, &cap) ||
        bw_arg_float("residual_scale", PyTuple_GetItem(sizes, 7), -1e30, 1e30, &residual) ||
        bw_arg_int("activation", PyTuple_GetItem(sizes, 8), BW_SILU, BW_CLAMPED, &activation) ||
        bw_arg_float("alpha", PyTuple_GetItem(sizes, 9), -1e30, 1e30, &alpha) ||
        bw_arg_float("limit", PyTuple_GetItem(sizes, 10), 0, 1e30, &limit) ||
        bw_arg_int("dtype", PyTuple_GetItem(sizes, 11), BW_F32, BW_BF16, &dtype))
        return -1;
    core->hidden = (ptrdiff_t)v[0], core->heads = (ptrdiff_t)v[1];
    core->kv_heads = (ptrdiff_t)v[2], core->dim = (ptrdiff_t)v[3];
    core->attention_scale = (float)scale, core->attention_cap = (float)cap, core->residual_scale = (float)residual;
    core->activation = (bw_activation)activation;
    core->alpha = (float)alpha, core->limit = (float)limit;
    core->dtype = (bw_dtype)dtype;
    return 0;
}

static held_decoder *hold(PyObject *sizes, PyObject *linears, PyObject *blocks, PyObject *final) {
    held_decoder *d = PyMem_Calloc(1, sizeof *d);
    if (!d || bw_expect_tuple("linears", linears, -1) || bw_expect_tuple("blocks", blocks, -1)) goto fail;
    d->n_linears = PyTuple_Size(linears);
    d->n_blocks = PyTuple_Size(blocks);
    d->linears = PyMem_Calloc((size_t)d->n_linears + 1, sizeof *d->linears);
    d->linear_views = PyMem_Calloc((size_t)d->n_linears + 1, sizeof *d->linear_views);
    d->blocks = PyMem_Calloc((size_t)d->n_blocks + 1, sizeof *d->blocks);
    d->experts = PyMem_Calloc((size_t)d->n_blocks + 1, sizeof *d->experts);
    d->gains = PyMem_Calloc((size_t)d->n_blocks * VIEWS + 1, sizeof *d->gains);
    if (!d->linears || !d->linear_views || !d->blocks || !d->experts || !d->gains) goto fail;
    if (read_sizes(sizes, &d->core)) goto fail;
    for (Py_ssize_t i = 0; i < d->n_linears; i++)
        if (bw_linear_acquire(PyTuple_GetItem(linears, i), &d->linear_views[i], &d->linears[i])) goto fail;
    for (Py_ssize_t i = 0; i < d->n_blocks; i++)
        if (acquire_block(d, PyTuple_GetItem(blocks, i), d->gains + i * VIEWS, &d->experts[i], &d->blocks[i]))
            goto fail;
    if (bw_norm_acquire(final, &d->gains[d->n_blocks * VIEWS], &d->core.final)) goto fail;
    d->core.blocks = d->blocks;
    d->core.n_blocks = d->n_blocks;
    return d;
fail:
    if (!PyErr_Occurred()) PyErr_NoMemory();
    release(d);
    return NULL;
}

const char bw_doc_decoder[] =
    "decoder(sizes, linears, blocks, final)\n--\n\n"
    "A decoder described once for `decode`; its tensors stay where they are and are kept alive.\n\n"
    "sizes: (hidden, heads, kv_heads, dim, norm_by_head, attention_scale, attention_cap or 0, residual_scale,\n"
    "activation, alpha, limit, dtype), activation and dtype by their numbers in bitween.h. linears: ('packed', codes,\n"
    "scales, zeros, scheme, cols, bias, mode), ('trellis', codes, scales, rates, width, cols, bias, mode) or\n"
    "('plain', weight, bias) each, with one item more, True, where products are rounded before the bias is added.\n"
    "blocks: (parts, norms, window, rope, room, place, mixture, sinks) each; parts: q, k, v, o, gate, up, down, each\n"
    "(layer, first row, rows) or None; norms: before_attention, q, k, after_attention, before_mlp, after_mlp, each\n"
    "(kind, eps, gain) or None, like `final`; sinks: (heads,) or None. mixture: None or (router, shared_gate,\n"
    "experts, chosen, over_all, divided, pairs, dtype), experts a tuple of (gate, up, down), each like a part.";

PyObject *bw_py_decoder(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"sizes", "linears", "blocks", "final", NULL};
    PyObject *v[4];
    if (bw_parse("decoder", names, args, n_args, keywords, v)) return NULL;
    held_decoder *d = hold(v[0], v[1], v[2], v[3]);
    PyObject *capsule = d ? PyCapsule_New(d, capsule_name, destroy) : NULL;
    if (d && !capsule) release(d);
    return capsule;
}

/* ---- a step ---- */

typedef struct {
    bw_view x, out, padding, experts, tables[2 * BW_MOST_ROPES], rooms[MOST_ROOMS];
    bw_rope ropes[BW_MOST_ROPES];
    bw_room core_rooms[MOST_ROOMS];
    bw_step step;
} held_step;

static void release_step(held_step *s) {
    bw_view_release(&s->x);
    bw_view_release(&s->out);
    bw_view_release(&s->padding);
    bw_view_release(&s->experts);
    for (int i = 0; i < 2 * BW_MOST_ROPES; i++) bw_view_release(&s->tables[i]);
    for (int i = 0; i < MOST_ROOMS; i++) bw_view_release(&s->rooms[i]);
}

static const char *dtype_name(bw_dtype dtype) {
    return dtype == BW_F32 ? "float32" : dtype == BW_F16 ? "float16" : "bfloat16";
}

/* rope: (cosine, sine, steps) */
static int acquire_rope(held_step *s, int i, PyObject *rope, int64_t tokens) {
    bw_view *cosine = &s->tables[2 * i], *sine = cosine + 1;
    if (bw_expect_tuple("ropes", rope, 3) ||
        bw_view_acquire("cosine", PyTuple_GetItem(rope, 0), BW_CONTIGUOUS, cosine) ||
        bw_view_expect_dtype("cosine", cosine, "float32") || bw_view_expect_ndim("cosine", cosine, 2))
        return -1;
    const int64_t shape[2] = {tokens, cosine->shape[1]};
    if (bw_view_expect_shape("cosine", cosine, 2, shape) ||
        bw_view_array("sine", PyTuple_GetItem(rope, 1), "float32", 2, shape, 0, sine) ||
        bw_arg_flag("steps", PyTuple_GetItem(rope, 2), &s->ropes[i].steps))
        return -1;
    s->ropes[i].cosine = (const float *)cosine->data;
    s->ropes[i].sine = (const float *)sine->data;
    s->ropes[i].n = (ptrdiff_t)cosine->shape[1];
    return 0;
}

/* room: (data, start, end, seen) */
static int acquire_room(held_step *s, int i, PyObject *room, const bw_decoder *core) {
    bw_view *view = &s->rooms[i];
    int64_t start = 0, end = 0, seen = 0;
    if (bw_expect_tuple("rooms", room, 4) ||
        bw_view_acquire("room", PyTuple_GetItem(room, 0), BW_WRITABLE | BW_CONTIGUOUS, view) ||
        bw_view_expect_dtype("room", view, dtype_name(core->dtype)) || bw_view_expect_ndim("room", view, 6))
        return -1;
    const int64_t shape[6] = {view->shape[0], 2, s->step.batch, core->kv_heads, view->shape[4], core->dim};
    if (bw_view_expect_shape("room", view, 6, shape) ||
        bw_arg_int("start", PyTuple_GetItem(room, 1), 0, shape[4], &start) ||
        bw_arg_int("end", PyTuple_GetItem(room, 2), start, shape[4], &end) ||
        bw_arg_int("seen", PyTuple_GetItem(room, 3), end, PTRDIFF_MAX, &seen))
        return -1;
    s->core_rooms[i] = (bw_room){view->data,       (ptrdiff_t)shape[0], (ptrdiff_t)shape[4],
                                 (ptrdiff_t)start, (ptrdiff_t)end,      (ptrdiff_t)seen};
    return 0;
}

static int acquire_lists(held_step *s, PyObject *ropes, PyObject *rooms, const bw_decoder *core) {
    if (bw_expect_tuple("ropes", ropes, -1) || bw_expect_tuple("rooms", rooms, -1)) return -1;
    Py_ssize_t n_ropes = PyTuple_Size(ropes), n_rooms = PyTuple_Size(rooms);
    if (n_ropes > BW_MOST_ROPES || n_rooms > MOST_ROOMS) {
        PyErr_Format(PyExc_ValueError, "ropes, rooms: expected at most %d and %d; got %zd and %zd", BW_MOST_ROPES,
                     MOST_ROOMS, n_ropes, n_rooms);
        return -1;
    }
    for (int i = 0; i < (int)n_ropes; i++)
        if (acquire_rope(s, i, PyTuple_GetItem(ropes, i), s->step.batch * s->step.n_new)) return -1;
    for (int i = 0; i < (int)n_rooms; i++)
        if (acquire_room(s, i, PyTuple_GetItem(rooms, i), core)) return -1;
    s->step.ropes = s->ropes;
    s->step.n_ropes = (int)n_ropes;
    s->step.rooms = s->core_rooms;
    s->step.n_rooms = (int)n_rooms;
    return 0;
}

/* Refuses results that share memory with each other or with what is read. */
static int expect_apart(const held_step *s) {
    if (s->experts.data && bw_view_expect_apart("out", &s->out, "experts", &s->experts)) return -1;
    if (s->padding.data && bw_view_expect_apart("out", &s->out, "padding", &s->padding)) return -1;
    for (int i = 0; i < 2 * s->step.n_ropes; i++)
        if (bw_view_expect_apart("out", &s->out, "ropes", &s->tables[i])) return -1;
    for (int i = 0; i < s->step.n_rooms; i++) {
        if (bw_view_expect_apart("rooms", &s->rooms[i], "x", &s->x) ||
            bw_view_expect_apart("rooms", &s->rooms[i], "out", &s->out))
            return -1;
        for (int k = 0; k < i; k++)
            if (bw_view_expect_apart("rooms", &s->rooms[i], "rooms", &s->rooms[k])) return -1;
    }
    return 0;
}

/* experts: as many as the step's tokens choose in all blocks */
static int acquire_experts(held_step *s, PyObject *experts, const bw_decoder *core) {
    int64_t n = 0;
    for (ptrdiff_t i = 0; i < core->n_blocks; i++) {
        const bw_routing *routing = &core->blocks[i].mixture.routing;
        if (routing->n) n += s->step.batch * s->step.n_new * routing->chosen;
    }
    if (bw_view_array("experts", experts, "int64", 1, &n, 0, &s->experts)) return -1;
    s->step.experts = (const int64_t *)(const void *)s->experts.data;
    s->step.n_experts = (ptrdiff_t)n;
    return 0;
}

static int acquire_step(held_step *s, PyObject *const *v, const bw_decoder *core) {
    if (bw_view_acquire("x", v[1], BW_CONTIGUOUS, &s->x) || bw_view_expect_dtype("x", &s->x, dtype_name(core->dtype)) ||
        bw_view_expect_ndim("x", &s->x, 3))
        return -1;
    const int64_t shape[3] = {s->x.shape[0], s->x.shape[1], core->hidden};
    if (bw_view_expect_shape("x", &s->x, 3, shape) ||
        bw_view_array("out", v[2], dtype_name(core->dtype), 3, shape, BW_WRITABLE, &s->out) ||
        bw_view_expect_apart("out", &s->out, "x", &s->x))
        return -1;
    s->step.batch = (ptrdiff_t)shape[0];
    s->step.n_new = (ptrdiff_t)shape[1];
    s->step.x = s->x.data;
    s->step.out = s->out.data;
    if (shape[0] > BW_MOST_STEP || shape[1] > BW_MOST_STEP || shape[0] * shape[1] > BW_MOST_STEP) {
        PyErr_Format(PyExc_ValueError, "x: expected at most %d tokens; got %lld sequences of %lld", BW_MOST_STEP,
                     (long long)shape[0], (long long)shape[1]);
        return -1;
    }
    if (acquire_lists(s, v[3], v[4], core)) return -1;
    if (v[5] && bw_view_array("padding", v[5], "int64", 1, shape, 0, &s->padding)) return -1;
    s->step.padding = (const int64_t *)(const void *)s->padding.data;
    if (v[6] && acquire_experts(s, v[6], core)) return -1;
    return expect_apart(s);
}

const char bw_doc_decode[] =
    "decode(decoder, x, out, ropes, rooms, padding=None, experts=None)\n--\n\n"
    "One step: x (batch, new tokens, hidden), at most 16 tokens, through all blocks into `out`, both contiguous and "
    "of\n"
    "the decoder's dtype.\n\n"
    "ropes: a tuple of (cosine, sine, steps), float32 (tokens, n). rooms: a tuple of (data, start, end, seen), data\n"
    "(places, 2, batch, kv_heads, capacity, dim) of keys and values, whose rows end .. end+new-1 are written.\n"
    "padding: int64 (batch,), tokens at the start that nobody sees. experts: int64 (n,), those that are to be chosen,\n"
    "(tokens, chosen) of each block that has any, one after the other.";

PyObject *bw_py_decode(PyObject *module, PyObject *const *args, Py_ssize_t n_args, PyObject *keywords) {
    (void)module;
    static const char *const names[] = {"decoder", "x", "out", "ropes", "rooms", "|", "padding", "experts", NULL};
    PyObject *v[7], *result = NULL;
    held_step s = {0};
    if (bw_parse("decode", names, args, n_args, keywords, v)) return NULL;
    if (!PyCapsule_IsValid(v[0], capsule_name))
        return PyErr_Format(PyExc_TypeError, "decoder: expected what decoder() returned; got %R", v[0]);
    const held_decoder *d = PyCapsule_GetPointer(v[0], capsule_name);
    if (acquire_step(&s, v, &d->core)) goto done;
    bw_release_gil();
    bw_status status = bw_decode(&d->core, &s.step);
    bw_take_gil();
    if (status) bw_raise("decode", "decoder", status);
    else result = Py_NewRef(Py_None);
done:
    release_step(&s);
    return result;
}
