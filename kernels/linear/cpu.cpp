// y = x W^T + b in bfloat16 on AMX, the matrix unit of Intel's servers since Sapphire Rapids: one
// instruction multiplies 16 rows of x by 16 rows of W over 32 inputs. For few rows all the work is to
// read W, which lies packed in the order in which it is read: tile after tile of 1 KiB.
//
//   packed[n][k]: the tile of outputs 16 n .. and inputs 32 k .., 16 pairs of inputs (rows) by 16
//   outputs, the two inputs of a pair side by side; beyond the weight's edges there are zeros.
//
// A row's sums run over its inputs in order, whatever rows stand beside it: the same bits in any company.
// The targets' columns may each be of an input of their own.
#include "../cpu/amx.h"
#include "../cpu/tables.h"

namespace {

struct Shape {
    int64_t in_size, out_size;
    int64_t out_tiles() const { return div_up(out_size, TILE_OUTS); }
    int64_t in_tiles() const { return div_up(in_size, TILE_INS); }
};

void pack(const bfloat16* weight, const Shape& shape, bfloat16* packed) {
    for (int64_t n = 0; n < shape.out_tiles(); ++n)
        for (int64_t k = 0; k < shape.in_tiles(); ++k, packed += TILE)
            for (int64_t i = 0; i < TILE; ++i) {
                const int64_t pair = i / (2 * TILE_OUTS), out = n * TILE_OUTS + i / 2 % TILE_OUTS;
                const int64_t in = k * TILE_INS + 2 * pair + i % 2;
                const bool inside = out < shape.out_size && in < shape.in_size;
                packed[i] = inside ? weight[out * shape.in_size + in] : bfloat16{0};
            }
}

#ifdef HAS_AMX

// Tiles 0 .. 3 are sums, 4 and 5 of x, 6 and 7 of W.
constexpr int64_t BLOCK_ROWS = 2 * TILE_ROWS, BLOCK_OUTS = 2 * TILE_OUTS;
constexpr int64_t PART_ROWS = 128;  // from so many for each thread on, rows are shared out

struct Call {
    bfloat16* y;
    int64_t rows;
    Shape shape;
    const bfloat16 *packed, *bias;
};

// A target's columns begin .. end of y, which lie in blocks first .. last of outputs, and its input.
struct Columns {
    int64_t begin, end, first, last;
    Matrix<const bfloat16> x;
    Columns(int64_t begin, int64_t size, Matrix<const bfloat16> x)
        : begin(begin), end(begin + size), first(begin / BLOCK_OUTS), last(div_up(end, BLOCK_OUTS)), x(x) {}
    int64_t blocks() const { return last - first; }
};

// What a thread keeps: rows of x that fill no tile, with zeros behind them, and a block's sums.
struct Scratch {
    std::unique_ptr<bfloat16[]> rows;
    alignas(64) float sums[BLOCK_ROWS * BLOCK_OUTS];
    explicit Scratch(const Shape& shape)
        : rows(new bfloat16[BLOCK_ROWS * shape.in_tiles() * TILE_INS]) {}
};

// Rows from `row` on as tiles can be loaded of them: where they lie, or copied and padded.
Matrix<const bfloat16> tile_rows(const Shape& shape, Matrix<const bfloat16> x, int64_t count,
                                 Scratch& scratch) {
    const int64_t size = shape.in_size, padded = shape.in_tiles() * TILE_INS;
    if (size == padded && count % TILE_ROWS == 0) return x;
    std::memset(scratch.rows.get(), 0, sizeof(bfloat16) * BLOCK_ROWS * padded);
    for (int64_t r = 0; r < count; ++r)
        std::memcpy(scratch.rows.get() + r * padded, x.row(r), sizeof(bfloat16) * size);
    return {scratch.rows.get(), padded};
}

// sums (16 or 32 rows, 32 outputs) = x W^T over all inputs
template <bool TWO>
INLINE void multiply(Matrix<const bfloat16> x, const bfloat16* first, const bfloat16* second,
                     int64_t in_tiles, float* sums) {
    const int64_t stride = x.stride * static_cast<int64_t>(sizeof(bfloat16));
    const bfloat16* below = x.row(TWO ? TILE_ROWS : 0);
    memory_is_written();
    _tile_zero(0);  // GCC's are statements, not expressions
    _tile_zero(1);
    if (TWO) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < in_tiles; ++k, first += TILE, second += TILE) {
        _tile_loadd(4, x.data + k * TILE_INS, stride);
        _tile_loadd(6, first, TILE_BYTES);
        _tile_loadd(7, second, TILE_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, below + k * TILE_INS, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    constexpr int64_t SUMS_BYTES = sizeof(float) * BLOCK_OUTS;
    _tile_stored(0, sums, SUMS_BYTES);
    _tile_stored(1, sums + TILE_OUTS, SUMS_BYTES);
    if (TWO) {
        _tile_stored(2, sums + TILE_ROWS * BLOCK_OUTS, SUMS_BYTES);
        _tile_stored(3, sums + TILE_ROWS * BLOCK_OUTS + TILE_OUTS, SUMS_BYTES);
    }
}

// Those of the block's sums that are of the columns.
void write(const Call& call, const Columns& columns, int64_t row, int64_t count, int64_t block,
           const float* sums) {
    const int64_t out = max_of(block * BLOCK_OUTS, columns.begin);
    const int64_t outs = min_of((block + 1) * BLOCK_OUTS, columns.end) - out;
    sums += out - block * BLOCK_OUTS;
    for (int64_t r = 0; r < count; ++r, sums += BLOCK_OUTS) {
        bfloat16* y = call.y + (row + r) * call.shape.out_size + out;
        for_groups(outs, LANES, [&](int64_t i, auto... n) {
            const Floats sum = load(sums + i, n...);
            store(y + i, call.bias ? sum + load(call.bias + out + i, n...) : sum, n...);
        });
    }
}

// Two tiles of outputs for the rows from .. to: their weights are read from memory once.
void compute(const Call& call, const Columns& columns, int64_t block, int64_t from, int64_t to,
             Scratch& scratch) {
    const int64_t in_tiles = call.shape.in_tiles();
    const bfloat16* first = call.packed + 2 * block * in_tiles * TILE;
    const bool lone = 2 * block + 1 == call.shape.out_tiles();
    const bfloat16* second = lone ? first : first + in_tiles * TILE;  // its sums are not written
    for (int64_t row = from; row < to; row += BLOCK_ROWS) {
        const int64_t count = min_of(BLOCK_ROWS, to - row);
        const Matrix<const bfloat16> x =
            tile_rows(call.shape, columns.x.from(row), count, scratch);
        if (count > TILE_ROWS) multiply<true>(x, first, second, in_tiles, scratch.sums);
        else multiply<false>(x, first, second, in_tiles, scratch.sums);
        write(call, columns, row, count, block, scratch.sums);
    }
}

void multiply(const Call& call, const std::vector<Columns>& columns, int64_t threads) {
    // Few rows' time is that of reading weights, of which each thread has its part. Many rows' is that
    // of what lies between the operations, so each thread keeps to its part of the rows.
    const int64_t parts = call.rows >= threads * PART_ROWS ? threads : 1;
    const int64_t part_rows = div_up(div_up(call.rows, parts), BLOCK_ROWS) * BLOCK_ROWS;
    int64_t blocks = 0;
    for (const Columns& each : columns) blocks += each.blocks();
    share_tasks(parts * blocks, threads, [&](Tasks& tasks) {
        const TilesInUse in_use{TileConfig()};
        Scratch scratch(call.shape);
        tasks.each([&](int64_t task) {
            const int64_t from = task / blocks * part_rows;
            int64_t block = task % blocks;
            const Columns* own = columns.data();
            for (; block >= own->blocks(); ++own) block -= own->blocks();
            compute(call, *own, own->first + block, from, min_of(from + part_rows, call.rows), scratch);
        });
    });
}

#endif

}  // namespace

// Whether this processor has AMX and the kernel lets this process use it; the threads that there are
// and will be may use it then too.
extern "C" int64_t has_matrix_unit() { return matrix_unit(); }

// Elements of the packed weight.
extern "C" int64_t packed_size(int64_t in_size, int64_t out_size) {
    const Shape shape{in_size, out_size};
    return shape.out_tiles() * shape.in_tiles() * TILE;
}

extern "C" void pack_linear(const void* weight, int64_t in_size, int64_t out_size, void* packed) {
    pack(static_cast<const bfloat16*>(weight), {in_size, out_size}, static_cast<bfloat16*>(packed));
}

// Input t (rows, in) of the targets begins t * x_plane behind x.
extern "C" const char* linear_bfloat16(void* y, const void* x, int64_t x_plane, int64_t x_stride,
                                       int64_t rows, int64_t in_size, int64_t out_size,
                                       const void* packed, const void* bias,
                                       const Targets* targets, int64_t threads) {
#ifdef HAS_AMX
    const Call call{static_cast<bfloat16*>(y), rows, {in_size, out_size},
                    static_cast<const bfloat16*>(packed), static_cast<const bfloat16*>(bias)};
    std::vector<Columns> columns;
    for (int64_t t = 0; t < targets->count; ++t) {
        const int64_t start = targets->out_starts[t], size = targets->out_sizes[t];
        if (!inside(start, size, out_size)) return "a target reaches outside the output's columns";
        const auto* input = static_cast<const bfloat16*>(x) + t * x_plane;
        columns.push_back({start, size, {input, x_stride}});
    }
    multiply(call, columns, threads);
    return nullptr;
#else
    (void)y, (void)x, (void)x_plane, (void)x_stride, (void)rows, (void)in_size, (void)out_size;
    (void)packed, (void)bias, (void)targets, (void)threads;
    return "this processor has no matrix unit";
#endif
}
EXPORT_PACKED(linear_bfloat16)

// What a call reads most of its time, for threads that wait for it.
extern "C" Reads linear_bfloat16_reads(const Value* values) {
    const Shape shape{values[5].integer, values[6].integer};
    return {reinterpret_cast<const char*>(values[7].integer),
            shape.out_tiles() * shape.in_tiles() * TILE * static_cast<int64_t>(sizeof(bfloat16))};
}
