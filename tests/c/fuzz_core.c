/* The fuzz target over every function of the core; calls.c says how bytes become a call. */
#include "../../csrc/core/bitween.h"
#include "calls.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
    const char *name;
    call_from_bytes(bytes, n, &name);
    return 0;
}
