/* What five instructions of AMX do, for tests on processors without them. */
#include <stdint.h>
#include <string.h>

static __thread unsigned char tiles[8][16][64];

void emulated_ldtilecfg(const void *layout) { memset(tiles, 0, sizeof tiles); }

/* What is left in a register after a release must not be relied on. */
void emulated_tilerelease(void) { memset(tiles, 0x7f, sizeof tiles); }

void emulated_tileloadd64(int8_t t, const char *from, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy(tiles[t][i], from + i * stride, 64);
}

void emulated_tilestored64(int8_t t, char *to, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy(to + i * stride, tiles[t][i], 64);
}

static float widened(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void emulated_tdpbf16ps(int8_t sums, int8_t rows, int8_t weights) {
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++) {
            const uint16_t *a = (const uint16_t *)tiles[rows][m] + 2 * k, *b = (const uint16_t *)tiles[weights][k];
            float *c = (float *)tiles[sums][m], first = widened(a[0]), second = widened(a[1]);
            for (int n = 0; n < 16; n++) c[n] += first * widened(b[2 * n]) + second * widened(b[2 * n + 1]);
        }
}
