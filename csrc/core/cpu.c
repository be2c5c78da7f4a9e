/* Chooses among the compiled instruction sets by what CPUID reports. */
#include "cpu.h"

#include <stdatomic.h>
#include <string.h>

#define X(name) extern const bw_isa bw_isa_##name;
BW_ISA_LIST
#undef X

#define X(name) &bw_isa_##name,
static const bw_isa *const all_isas[] = {BW_ISA_LIST};
#undef X

#define N_ISAS ((int)(sizeof all_isas / sizeof *all_isas))

static _Atomic(const bw_isa *) chosen;

static const bw_isa *best(void) {
    const bw_isa *isa = NULL;
    for (int i = 0; i < N_ISAS; i++)
        if (all_isas[i]->supported() && (!isa || all_isas[i]->rank > isa->rank)) isa = all_isas[i];
    return isa;
}

bw_status bw_choose_isa(const char *forced) {
    const bw_isa *isa = NULL;
    if (!forced || !*forced) isa = best();
    else
        for (int i = 0; i < N_ISAS; i++)
            if (!strcmp(all_isas[i]->name, forced) && all_isas[i]->supported()) isa = all_isas[i];
    if (!isa) return BW_ERR_ARGUMENT;
    atomic_store(&chosen, isa);
    return BW_OK;
}

const bw_isa *bw_cpu(void) {
    const bw_isa *isa = atomic_load_explicit(&chosen, memory_order_acquire);
    if (!isa) {
        isa = best(); /* the scalar set always runs */
        atomic_store(&chosen, isa);
    }
    return isa;
}

const char *bw_isa_name(void) {
    return bw_cpu()->name;
}

const char *bw_isa_list(int i, int *supported) {
    if (i < 0 || i >= N_ISAS) return NULL;
    *supported = all_isas[i]->supported();
    return all_isas[i]->name;
}
