// AMX, the matrix unit of Intel's servers since Sapphire Rapids. One instruction multiplies a tile of
// up to 16 rows of 32 bfloat16 by one of 16 pairs of rows, the two bfloat16 of a pair side by side,
// into 16 x 16 sums in float32. Each sum runs over its products in one order, whatever the other rows
// and columns hold, so it has the same bits in any company.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__linux__)
#define HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Whether this processor has the unit and the system lends it to this process; all its threads may
// use it then.
inline bool matrix_unit() {
#ifdef HAS_AMX
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool lent = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return lent;
#else
    return false;
#endif
}

constexpr int64_t TILE_ROWS = 16, TILE_OUTS = 16, TILE_INS = 32, TILE = TILE_OUTS * TILE_INS;
constexpr int TILE_BYTES = 64;  // of a full row of any tile

#ifdef HAS_AMX

// Palette 1: eight tiles, each of at most 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    TileConfig() {
        for (int tile = 0; tile < 8; ++tile) shape(tile, TILE_ROWS, TILE_BYTES);
    }
    void shape(int tile, int64_t count, int64_t bytes) {
        rows[tile] = static_cast<uint8_t>(count);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};

// Comes between what is stored and tiles that are loaded of it: GCC's instruction that loads a tile does
// not say that it reads memory.
INLINE void memory_is_written() { asm volatile("" : : : "memory"); }

// The tiles are in use, shaped like this, for as long as the object lives.
class TilesInUse {
  public:
    explicit TilesInUse(const TileConfig& config) {
        // GCC is only told that the instruction reads the first eight bytes, and may store none but those.
        asm volatile("" : : "m"(config));
        _tile_loadconfig(&config);
    }
    ~TilesInUse() { _tile_release(); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};

#endif
