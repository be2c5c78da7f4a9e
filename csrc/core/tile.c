/* The search for a group's range on 64 rows, which GPTQ and its refinement share. */
#include "tile.h"

#include <string.h>

void bw_tile_search(const bw_tile_job *job, const bw_tile *tile, const bw_tile_grid *start, bw_reach reach,
                    float *errors, bw_tile_grid *best, float *best_costs) {
    const bw_isa *isa = bw_cpu();
    int levels = job->scheme.levels;
    float narrowest = levels <= 4 ? 0.35f : levels == 8 ? 0.55f : levels == 16 ? 0.75f : 0.85f;
    float coarse = reach == BW_NEXT ? 0.04f : 0.05f;
    bw_tile_grid center = *start;
    isa->tile_try(tile, start, 1, 0, errors, best, best_costs);
    for (float ratio = 0.9f; reach == BW_WIDE && ratio > narrowest; ratio -= 0.1f)
        isa->tile_try(tile, start, ratio, 0, errors, best, best_costs);
    for (int shift = -1; shift <= 1; shift++) {
        if (shift && (job->scheme.symmetric || reach == BW_NEXT)) continue;
        if (shift || reach == BW_WIDE) center = *best;
        if (shift) isa->tile_try(tile, &center, 1, (float)shift, errors, best, best_costs);
        isa->tile_try(tile, &center, 1 - coarse, (float)shift, errors, best, best_costs);
        isa->tile_try(tile, &center, 1 + coarse, (float)shift, errors, best, best_costs);
    }
    if (reach == BW_NEXT) return;
    center = *best;
    isa->tile_try(tile, &center, 0.975f, 0, errors, best, best_costs);
    isa->tile_try(tile, &center, 1.025f, 0, errors, best, best_costs);
}
