/* How many bits each column tile of a trellis matrix gets. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "alloc.h"
#include "bitween.h"
#include "codec/trellis.h"
#include "scheme.h"

#define LEAST_GAIN 1.1 /* of what a bit saves in one tile, to what it costs in another, for it to move */

/* Squared error that each rate leaves of Gaussian weights of variance 1 (docs/trellis.md), those of no bits at all. */
static const double error_at[BW_TRELLIS_MOST_RATE + 1] = {1, 0.277, 0.0743, 0.0192, 0.0050, 0.00135};

typedef struct {
    double cost;
    ptrdiff_t tile;
} ranked;

static int descending(const void *left, const void *right) {
    const ranked *a = left, *b = right;
    if (a->cost != b->cost) return a->cost < b->cost ? 1 : -1;
    return a->tile < b->tile ? -1 : a->tile > b->tile;
}

/* Moves single bits from tiles that miss them least to those that need them most, as long as that pays: the
 * distribution of bits over sources of unequal variance (Cover and Thomas, Elements of Information Theory, 10.3.3), in
 * whole bits. All tiles together keep their bytes. A channel that is a thousand times as active as the others, as every
 * larger language model has some, takes all the bits that a tile can have. */
static void move_bits(const ranked *all, ptrdiff_t n, uint8_t *rates) {
    for (ptrdiff_t moves = 0; moves < BW_TRELLIS_MOST_RATE * n; moves++) {
        ptrdiff_t up = -1, down = -1;
        double gain = 0, loss = INFINITY;
        for (ptrdiff_t i = 0; i < n; i++) {
            int rate = rates[all[i].tile];
            double more = rate < BW_TRELLIS_MOST_RATE ? all[i].cost * (error_at[rate] - error_at[rate + 1]) : 0;
            double less = rate > 1 ? all[i].cost * (error_at[rate - 1] - error_at[rate]) : INFINITY;
            if (more > gain) gain = more, up = i;
            if (less <= loss) loss = less, down = i;
        }
        if (up < 0 || down < 0 || up == down || !(gain > LEAST_GAIN * loss)) return;
        rates[all[up].tile]++;
        rates[all[down].tile]--;
    }
}

bw_status bw_trellis_rates(const double *needs, ptrdiff_t n, int32_t half_bits, int32_t turned, uint8_t *rates) {
    if (n < 0 || n > BW_MOST_VALUES || half_bits < 2 || half_bits > 2 * BW_TRELLIS_MOST_RATE) return BW_ERR_ARGUMENT;
    if (!n) return BW_OK;
    if (!needs || !rates) return BW_ERR_ARGUMENT;
    for (ptrdiff_t t = 0; t < n; t++)
        if (!(needs[t] >= 0 && needs[t] < INFINITY)) return BW_ERR_IMPORTANCE;
    ranked *all = bw_alloc(n, sizeof *all);
    if (!all) return BW_ERR_MEMORY;
    for (ptrdiff_t t = 0; t < n; t++) all[t] = (ranked){needs[t], t};
    qsort(all, (size_t)n, sizeof *all, descending);
    for (ptrdiff_t i = 0; i < n; i++)
        rates[all[i].tile] = (uint8_t)(half_bits / 2 + (half_bits % 2 && i < (n + 1) / 2));
    if (!turned) move_bits(all, n, rates);
    bw_free(all);
    return BW_OK;
}
