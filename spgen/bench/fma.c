/* The most multiply-adds this core can do: independent chains in vector registers, no memory.
   LANES floats a vector, CHAINS vectors (fewer than there are registers). */
typedef float vector __attribute__((vector_size(4 * LANES)));

float fma_rounds(long rounds) {
    vector chain[CHAINS], factor, term;
    for (int lane = 0; lane < LANES; lane++) {
        factor[lane] = 0.999f;
        term[lane] = 0.001f;
    }
    for (int n = 0; n < CHAINS; n++)
        chain[n] = factor * (float)n;
    for (long round = 0; round < rounds; round++) {
#pragma GCC unroll 64
        for (int n = 0; n < CHAINS; n++)
            chain[n] = chain[n] * factor + term;
    }
    float sum = 0; /* so that no chain can be left out */
    for (int n = 0; n < CHAINS; n++)
        for (int lane = 0; lane < LANES; lane++)
            sum += chain[n][lane];
    return sum;
}

#ifdef __AVX512BF16__
#include <immintrin.h>

/* The same with vdpbf16ps: two products of bf16 a lane, added to fp32. */
float pair_rounds(long rounds) {
    __m512 chain[CHAINS];
    __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    for (int n = 0; n < CHAINS; n++)
        chain[n] = _mm512_set1_ps((float)n);
    for (long round = 0; round < rounds; round++) {
#pragma GCC unroll 64
        for (int n = 0; n < CHAINS; n++)
            chain[n] = _mm512_dpbf16_ps(chain[n], ones, ones);
    }
    float sum = 0;
    for (int n = 0; n < CHAINS; n++)
        sum += _mm512_reduce_add_ps(chain[n]);
    return sum;
}
#endif
