/* The best path of one tile: costs forward by the kernel, the path backward from them. */
#include "trellis_path.h"

#include <string.h>

#include "alloc.h"
#include "codec/trellis.h"

enum { TILE = BW_TRELLIS_TILE, SLACK = 16 };

static ptrdiff_t stride_of(int width, int rate) {
    return ((ptrdiff_t)1 << (width - rate)) + SLACK;
}

ptrdiff_t bw_path_bytes(int width, int rate) {
    return bw_aligned((TILE + 1) * stride_of(width, rate) * 2);
}

/* What kernels/trellis.h adds for a weight x at a value. */
static int square(int x, int value, int doublings) {
    int d = x - value;
    for (int i = 0; i <= doublings; i++) {
        d = d < -32768 ? -32768 : d > 32767 ? 32767 : d;
        if (i < doublings) d += d;
    }
    return (d * d + (1 << 14)) >> 15;
}

/* Codes of weights number `until` .. n-1 of the walk, back from `group`; returns the group before them. */
static int trace(const bw_walk *w, int until, int group, uint8_t *codes) {
    int groups = 1 << (w->width - w->rate), doublings = w->rate > 3 ? w->rate - 3 : 0;
    for (int i = w->n - 1; i >= until; i--) {
        const uint16_t *before = w->costs + i * w->stride;
        int at = (w->first + i) % TILE, best = 1 << 20, from = group;
        const int16_t *values = w->values[w->columns[at]];
        for (int s = group; s < 1 << w->width; s += groups) {
            int cost = before[s >> w->rate] + square(w->x[at], values[s], doublings);
            if (cost < best) best = cost, from = s;
        }
        codes[at] = (uint8_t)(from & ((1 << w->rate) - 1));
        group = from >> w->rate;
    }
    return group;
}

void bw_find_path(bw_walk *w, int thorough, uint8_t *codes) {
    int groups = 1 << (w->width - w->rate), group = 0;
    w->stride = stride_of(w->width, w->rate);
    /* A path nearly forgets where it began within a few states' lengths, but not quite: once around the whole ring
     * finds a better seam yet. */
    int half = thorough ? TILE / 2 : 8 * w->width / w->rate;
    half = half < TILE / 2 ? half : TILE / 2;
    w->first = TILE - half;
    w->n = 2 * half;
    memset(w->costs, 0, (size_t)groups * 2);
    bw_cpu()->trellis_walk(w);
    const uint16_t *last = w->costs + w->n * w->stride;
    for (int u = 1; u < groups; u++)
        if (last[u] < last[group]) group = u;
    int seam = trace(w, half, group, codes);
    w->first = 0;
    w->n = TILE;
    memset(w->costs, 255, (size_t)groups * 2);
    w->costs[seam] = 0;
    bw_cpu()->trellis_walk(w);
    trace(w, 0, seam, codes);
}

void bw_pack_path(const uint8_t *codes, int rate, uint8_t *tile) {
    uint32_t bits = 0;
    int held = 0;
    for (int i = 0; i < TILE; i++) {
        bits = bits << rate | codes[i];
        for (held += rate; held >= 8; held -= 8) *tile++ = (uint8_t)(bits >> (held - 8));
    }
}

void bw_path_values(const uint8_t *codes, int width, int rate, int16_t *values) {
    uint32_t state = 0, mask = (1u << width) - 1;
    for (int i = TILE - width; i < TILE; i++) state = (state << rate | codes[i]) & mask;
    for (int i = 0; i < TILE; i++) {
        state = (state << rate | codes[i]) & mask;
        values[i] = (int16_t)bw_trellis_value(state, width);
    }
}
