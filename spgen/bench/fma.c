/* The most multiply-adds that the cores can do: independent chains in vector registers, no memory.
   LANES floats a vector, CHAINS vectors (fewer than there are registers). Functions are workers as in openmp.c. */
#include <stdint.h>

typedef struct {
    void *sync;
    int32_t workers;
} Environment;

typedef struct {
    int64_t rounds;
    int32_t workers; /* written: as many as there were */
    volatile float sums; /* written, so that no chain can be left out */
} Work;

typedef float vector __attribute__((vector_size(4 * LANES)));

int fma_rounds(int index, Environment *environment, Work *work) {
    vector chain[CHAINS], factor, term;
    for (int lane = 0; lane < LANES; lane++) {
        factor[lane] = 0.999f;
        term[lane] = 0.001f;
    }
    for (int n = 0; n < CHAINS; n++)
        chain[n] = factor * (float)n;
    int64_t rounds = work->rounds;
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 64
        for (int n = 0; n < CHAINS; n++)
            chain[n] = chain[n] * factor + term;
    }
    float sum = 0;
    for (int n = 0; n < CHAINS; n++)
        for (int lane = 0; lane < LANES; lane++)
            sum += chain[n][lane];
    work->sums = sum;
    work->workers = environment->workers;
    return 0;
}

#ifdef __AVX512BF16__
#include <immintrin.h>

/* The same with vdpbf16ps: two products of bf16 a lane, added to fp32. */
int pair_rounds(int index, Environment *environment, Work *work) {
    __m512 chain[CHAINS];
    __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    for (int n = 0; n < CHAINS; n++)
        chain[n] = _mm512_set1_ps((float)n);
    int64_t rounds = work->rounds;
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 64
        for (int n = 0; n < CHAINS; n++)
            chain[n] = _mm512_dpbf16_ps(chain[n], ones, ones);
    }
    float sum = 0;
    for (int n = 0; n < CHAINS; n++)
        sum += _mm512_reduce_add_ps(chain[n]);
    work->sums = sum;
    work->workers = environment->workers;
    return 0;
}
#endif
