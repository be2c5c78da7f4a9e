#include "calls.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "made.h"
#include "memory.h"

static int call_storing(tape *t, int which) {
    ptrdiff_t rows = draw_size(t, 9), cols = draw_size(t, which == 2 ? 150 : 300);
    bw_layout layout;
    int too_large;
    bw_quantized out = room_for(draw_scheme(t), rows, cols, &layout, &too_large);
    if (too_large) return BW_OK;
    fill_stored(t, &out, &layout);
    ptrdiff_t odd = draw(t, 32) == 31;
    bw_matrix weight = draw_view(t, rows, larger(cols, odd));
    uint64_t before = digest(&out, &layout);
    bw_status status;
    if (which == 0) status = bw_quantize_rtn(&weight, &out);
    else if (which == 1) {
        bw_matrix importance = draw_view(t, rows, cols);
        status = bw_quantize_clip(&weight, draw(t, 2) ? &importance : NULL, &out);
    } else if (which == 2) {
        bw_gptq_options options = {draw(t, 3) * 0.01, 1e-3, (int32_t)draw(t, 4) - 1, (int32_t)draw(t, 2)};
        if (draw(t, 32) == 31) options.damping = draw(t, 2) ? NAN : -1;
        bw_gptq_report report = {0};
        if (rows >= 0 && rows < 1000 && draw(t, 2)) report.row_errors = take((size_t)rows * 8);
        status = bw_quantize_gptq(&weight, draw_hessian(t, cols), &options, &out, &report);
    } else status = bw_encode(&weight, &out);
    if (refused(status) && digest(&out, &layout) != before) broken("a refused call writes nothing");
    if (!status && odd && rows && cols) broken("shapes that do not fit are refused");
    if (!status && layout.n_bytes) check_stored(&out);
    return status;
}

static int call_reading(tape *t, int which) {
    ptrdiff_t rows = draw_size(t, 40), cols = draw_size(t, 300);
    bw_layout layout;
    int too_large;
    bw_quantized stored = room_for(draw_scheme(t), rows, cols, &layout, &too_large);
    if (too_large) return BW_OK;
    fill_stored(t, &stored, &layout);
    if (layout.n_bytes && draw(t, 2)) {
        bw_matrix weight = draw_view(t, rows, cols);
        if (bw_quantize_rtn(&weight, &stored) == BW_ERR_MEMORY) return BW_ERR_MEMORY;
    }
    if (draw(t, 64) == 63) stored.scales = NULL;
    ptrdiff_t held = layout.n_bytes ? rows : 0;
    bw_dtype dtype = (bw_dtype)draw(t, draw(t, 32) == 31 ? 5 : 3);
    if (which == 0) return bw_dequantize(&stored, dtype, take((size_t)(held * cols) * (held ? width_of(dtype) : 0)));
    ptrdiff_t n = draw_size(t, which == 1 ? 12 : 40), fits = n < 0 || n > 1000 ? 0 : n;
    if (which == 1) {
        int64_t *ids = take((size_t)fits * 8);
        for (ptrdiff_t i = 0; i < fits; i++) ids[i] = draw(t, 16) == 15 ? INT64_MIN + (int64_t)draw(t, 4) : draw(t, 50);
        ptrdiff_t ask = n > 1000 ? PTRDIFF_MAX : n;
        return bw_dequantize_rows(&stored, ids, ask, dtype, take(held ? (size_t)(fits * cols) * width_of(dtype) : 0));
    }
    bw_matrix x = draw_view(t, n, cols), bias = draw_view(t, 1, rows);
    int legal = rows >= 0 && rows < 1000;
    void *out = take(legal ? (size_t)(fits * rows) * width_of(dtype) : 0);
    if ((n > 1000 || !legal) && !cols) return BW_OK; /* legal, and more than a test may take */
    return bw_matmul(&x, &stored, draw(t, 2) ? &bias : NULL, (bw_mode)draw(t, draw(t, 32) == 31 ? 5 : 3), dtype, out);
}

static int call_trellis_storing(tape *t, int unused) {
    (void)unused;
    static const int32_t odd_bits[] = {0, 1, 11, -2, INT32_MAX, INT32_MIN};
    ptrdiff_t rows = draw_size(t, 20), cols = draw_size(t, 40), n_bytes;
    bw_trellis_options options = {draw(t, 3) * 0.01,   2 + (int32_t)draw(t, 9), (int32_t)draw(t, 2),
                                  (int32_t)draw(t, 2), (int32_t)draw(t, 2),     draw(t, 16) == 15};
    bw_trellis out = trellis_room_for(t, rows, cols, options.half_bits, &n_bytes);
    if (draw(t, 32) == 31) options.half_bits = odd_bits[draw(t, 6)];
    if (draw(t, 32) == 31) options.damping = draw(t, 2) ? NAN : -1;
    memset(out.codes, 0x5a, (size_t)n_bytes);
    ptrdiff_t odd = draw(t, 32) == 31;
    bw_matrix weight = draw_view(t, rows, larger(cols, odd));
    float *h = draw(t, 2) ? draw_hessian(t, cols) : NULL, *importance = draw(t, 2) && !h ? draw_array(t, cols) : NULL;
    if (cols > 1000) return BW_OK; /* needs as many rates */
    bw_gptq_report report = {0};
    if (rows >= 0 && rows < 1000 && draw(t, 2)) report.row_errors = take((size_t)rows * 8);
    bw_status status = bw_trellis_quantize(&weight, h, importance, &options, &out, &report);
    for (ptrdiff_t i = 0; refused(status) && i < n_bytes; i++)
        if (out.codes[i] != 0x5a) broken("a refused call writes nothing");
    if (status || !n_bytes) return status;
    if (odd) broken("shapes that do not fit are refused");
    float *values = take((size_t)(rows * cols) * 4);
    bw_status back = bw_trellis_dequantize(&out, 0, rows, BW_F32, values);
    if (back && back != BW_ERR_MEMORY) broken("what was stored reads back");
    for (ptrdiff_t i = 0; !back && i < rows * cols; i++)
        if (!isfinite(values[i])) broken("what was stored is finite");
    return status;
}

static int call_trellis_reading(tape *t, int multiply) {
    int turned = draw(t, 8) == 7;
    ptrdiff_t rows = turned ? 128 : draw_size(t, 40), n_bytes;
    ptrdiff_t cols = turned ? 128 + 128 * (ptrdiff_t)draw(t, 2) : draw_size(t, 150);
    bw_trellis stored = trellis_room_for(t, rows, cols, 0, &n_bytes);
    stored.turned = turned || draw(t, 32) == 31; /* of other shapes, it is refused */
    if (turned && draw(t, 8)) stored.width = 16;
    ptrdiff_t held = n_bytes ? rows : 0;
    fill_trellis(t, &stored, n_bytes);
    for (ptrdiff_t i = 1; turned && i < cols / 16 && draw(t, 64); i++) stored.rates[i] = stored.rates[0];
    if (rows > 1000 || cols > 1000) stored.rates = NULL; /* would need as many */
    if (draw(t, 64) == 63) stored.scales = NULL;
    bw_dtype dtype = (bw_dtype)draw(t, draw(t, 32) == 31 ? 5 : 3);
    ptrdiff_t n = draw_size(t, 40), fits = n < 0 || n > 1000 ? 0 : n;
    if (!multiply) {
        ptrdiff_t first = draw_size(t, 40);
        return bw_trellis_dequantize(&stored, first, n, dtype, take((size_t)(fits * (held ? cols : 0)) * 4));
    }
    bw_matrix x = draw_view(t, n, cols), bias = draw_view(t, 1, rows);
    void *out = take(rows >= 0 && rows < 1000 ? (size_t)(fits * rows) * width_of(dtype) : 0);
    if ((n > 1000 || rows > 1000) && !cols) return BW_OK; /* legal, and more than a test may take */
    return bw_trellis_matmul(&x, &stored, draw(t, 2) ? &bias : NULL, (bw_mode)draw(t, draw(t, 32) == 31 ? 5 : 3), dtype,
                             out);
}

static int call_loss(tape *t, int which) {
    ptrdiff_t rows = draw_size(t, 12), cols = draw_size(t, 400), fits = rows < 0 || rows > 1000 ? 0 : rows;
    bw_matrix logits = draw_view(t, rows, cols);
    if (which == 2) {
        double sum = 0;
        return bw_total(&logits, &sum);
    }
    float *out = take((size_t)fits * 4);
    if (which == 1) {
        bw_matrix reference = draw_view(t, rows, larger(cols, draw(t, 32) == 31));
        return bw_kl_divergence(&reference, &logits, out);
    }
    int64_t *targets = take((size_t)fits * 8);
    for (ptrdiff_t i = 0; i < fits; i++) targets[i] = (int64_t)draw(t, 420) - (draw(t, 32) == 31 ? 30 : 0);
    if (rows > 1000) return BW_OK; /* needs as many targets */
    bw_status status = bw_cross_entropy(&logits, targets, out);
    for (ptrdiff_t i = 0; i < fits && !status; i++)
        if (targets[i] < 0 || targets[i] >= cols) broken("targets outside are refused");
    return status;
}

static int call_search(tape *t, int unused) {
    (void)unused;
    ptrdiff_t rows = draw_size(t, 6), cols = draw_size(t, 200);
    bw_matrix weight = draw_view(t, rows, cols), importance = draw_view(t, rows, cols);
    bw_scheme schemes[6];
    ptrdiff_t n = draw(t, 7);
    for (ptrdiff_t i = 0; i < n; i++) schemes[i] = draw_scheme(t);
    double *out = take((size_t)n * 8), *by_row = NULL;
    if (rows >= 0 && rows < 100 && draw(t, 2)) {
        by_row = take((size_t)rows * 8);
        for (ptrdiff_t i = 0; i < rows; i++) by_row[i] = draw(t, 32) == 31 ? -1.0 : draw(t, 5) * 0.5;
    }
    bw_status status = bw_search(&weight, schemes, n, draw(t, 2) ? &importance : NULL, by_row, (int)draw(t, 2), out);
    for (ptrdiff_t i = 0; i < n && !status; i++)
        if (!(out[i] >= 0)) broken("errors are numbers of at least zero");
    return status;
}

static int call_hessian(tape *t, int unused) {
    (void)unused;
    ptrdiff_t tokens = draw_size(t, 20), cols = draw_size(t, 70), other = draw_size(t, 70);
    int cross = (int)draw(t, 2);
    bw_matrix x = draw_view(t, tokens, cols), y = draw_view(t, larger(tokens, draw(t, 32) == 31), other);
    ptrdiff_t across = cross ? other : cols, n;
    if (cols < 0 || across < 0 || __builtin_mul_overflow(cols, across, &n) || n > MOST_BYTES / 4) n = 0;
    float *h = take((size_t)n * 4), *weights = tokens >= 0 && tokens < 1000 ? draw_array(t, tokens) : NULL;
    memset(h, 0, (size_t)n * 4);
    if (n == 0 && (cols > 1000 || across > 1000) && cols && across) h = NULL; /* needs more than a test may take */
    return bw_hessian_add(&x, cross ? &y : NULL, draw(t, 2) ? weights : NULL, h);
}

static int call_align(tape *t, int unused) {
    (void)unused;
    ptrdiff_t rows = draw_size(t, 9), cols = draw_size(t, 90);
    bw_matrix weight = draw_view(t, rows, cols);
    float *h = draw_hessian(t, cols), *c = draw_hessian(t, cols);
    double damping = draw(t, 4) * 0.05, share = draw(t, 5) * 0.25;
    if (draw(t, 32) == 31) share = draw(t, 2) ? NAN : 2;
    ptrdiff_t n;
    if (rows < 0 || cols < 0 || __builtin_mul_overflow(rows, cols, &n) || n > MOST_BYTES / 4) n = 0;
    return bw_align(&weight, h, c, share, &damping, take((size_t)n * 4));
}

static int call_rounding(tape *t, int backward) {
    ptrdiff_t rows = draw_size(t, 9), cols = draw_size(t, 200), n = 0, groups = 0;
    bw_scheme s = draw_scheme(t);
    bw_layout layout = {0};
    bw_status legal = bw_scheme_layout(&s, rows, cols, &layout);
    if (!legal) {
        if (layout.n_bytes > MOST_BYTES / 8) return BW_OK;
        n = rows * cols;
        groups = rows * layout.n_groups;
    }
    float *low = draw_array(t, groups), *high = draw_array(t, groups);
    bw_rounding r = {draw_array(t, n), draw_array(t, n), s.symmetric ? NULL : low, high, rows, cols, s};
    if (!backward) return bw_train_forward(&r, draw_array(t, n));
    float *into_low = s.symmetric ? NULL : draw_array(t, groups);
    return bw_train_backward(&r, draw_array(t, n), draw_array(t, n), into_low, draw_array(t, groups));
}

static int call_pack(tape *t, int unpack) {
    ptrdiff_t rows = draw_size(t, 9), cols = draw_size(t, 300);
    bw_scheme s = draw_scheme(t);
    s.symmetric = 1, s.group_size = -1; /* of no concern to packing */
    bw_layout layout = {0};
    bw_status legal = bw_scheme_layout(&s, rows, cols, &layout);
    if (!legal && layout.n_bytes > MOST_BYTES) return BW_OK;
    size_t wide = legal ? 0 : (size_t)(rows * cols), narrow = legal ? 0 : (size_t)(rows * layout.row_bytes);
    uint8_t *codes = take(wide), *packed = take(narrow);
    fill_bytes(t, codes, (ptrdiff_t)wide);
    fill_bytes(t, packed, (ptrdiff_t)narrow);
    if (draw(t, 4))
        for (size_t i = 0; i < wide && s.levels > 0; i++) codes[i] = (uint8_t)(codes[i] % s.levels);
    if (unpack) return bw_unpack(packed, rows, cols, s.levels, codes);
    bw_status status = bw_pack(codes, rows, cols, s.levels, packed);
    if (!status && wide) {
        uint8_t *again = take(wide);
        bw_status back = bw_unpack(packed, rows, cols, s.levels, again);
        if (back != BW_ERR_MEMORY && (back || memcmp(codes, again, wide))) broken("packed codes come back");
    }
    return status;
}

static int call_layout(tape *t, int unused) {
    (void)unused;
    bw_scheme s = draw_scheme(t);
    bw_layout layout;
    ptrdiff_t rows = draw_size(t, 1000), cols = draw_size(t, 1000);
    bw_status status = bw_scheme_layout(&s, rows, cols, &layout);
    if (!status && (layout.n_bytes < 0 || layout.row_bytes < 0 || layout.n_groups < 0))
        broken("sizes are not negative");
    return status;
}

static int call_mirror(tape *t, int unused) {
    (void)unused;
    ptrdiff_t side = draw_size(t, 90);
    float *h = draw_array(t, side < 0 || side > 1000 ? 0 : side * side);
    return side > 1000 && side < (ptrdiff_t)1 << 33 ? BW_OK : bw_mirror_upper(side, h);
}

static const struct {
    const char *name;
    int (*call)(tape *, int which);
    int which;
} calls[N_CALLS] = {{"scheme_layout", call_layout, 0},
                    {"quantize_rtn", call_storing, 0},
                    {"quantize_clip", call_storing, 1},
                    {"quantize_gptq", call_storing, 2},
                    {"encode", call_storing, 3},
                    {"dequantize", call_reading, 0},
                    {"dequantize_rows", call_reading, 1},
                    {"matmul", call_reading, 2},
                    {"cross_entropy", call_loss, 0},
                    {"kl_divergence", call_loss, 1},
                    {"total", call_loss, 2},
                    {"trellis_quantize", call_trellis_storing, 0},
                    {"trellis_dequantize", call_trellis_reading, 0},
                    {"trellis_matmul", call_trellis_reading, 1},
                    {"search", call_search, 0},
                    {"hessian_add", call_hessian, 0},
                    {"mirror_upper", call_mirror, 0},
                    {"align", call_align, 0},
                    {"train_forward", call_rounding, 0},
                    {"train_backward", call_rounding, 1},
                    {"pack", call_pack, 0},
                    {"unpack", call_pack, 1},
                    {"decode", call_decode, 0}};

int call_from_bytes(const uint8_t *bytes, size_t n, const char **named) {
    tape t = {bytes, bytes + n};
    unsigned which = draw(&t, N_CALLS);
    *named = calls[which].name;
    int status = calls[which].call(&t, calls[which].which);
    release_all();
    return status;
}

void make_up(uint64_t *random, uint8_t *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) bytes[i] = (uint8_t)(step_random(random) >> 29);
}

uint64_t first_random(const char *seed) {
    return strtoull(seed, NULL, 10) * 0x9e3779b97f4a7c15u + 1;
}
