// add_kronecker on the CPU. For the rows of a unit at once H = X D^T (or X R^T), then for each of them
// G = L H, where R is factored Y = G U^T, and y += w Y (or w G). All of it lies in scratch, as floats,
// and so do the factors. In bfloat16 the matrix unit does it where there is one, if R is whole.
#include "../cpu/products.h"
#include "../cpu/tables.h"
#include "matrix_tiles.h"

namespace {

template <class T, class W>
struct Kronecker {
    static constexpr int64_t BLOCK_ROWS = 16, STRIP = 64;

    int64_t l, m, k, n, rank;
    const W *left, *right, *up;

    Kronecker(Cell<W>& cell, int64_t in_size, int64_t out_size)
        : l(cell[0]), m(cell[1]), k(quotient(out_size, l)), n(quotient(in_size, m)), rank(cell[2]),
          left(cell.numbers(3, l, m)), right(cell.numbers(4, rank ? rank : k, n)),
          up(rank ? cell.numbers(5, k, rank) : nullptr) {
        cell.require(k >= 0 && n >= 0, "a Kronecker factor's sizes do not divide the target's");
    }

    int64_t columns() const { return l * k; }
    int64_t block_columns() const { return l * k; }  // of all columns, as they share H
    int64_t scratch() const {
        return (BLOCK_ROWS * m + l) * width() + (rank + l) * padded(k) + l * m +
               BLOCK_ROWS * m * n + n * STRIP;
    }

    const char* compute(const Block<T>& block, float* scratch) const {
        const Matrix<float> h{scratch, width()}, g{h.row(BLOCK_ROWS * m), width()};
        const Matrix<float> up_t{g.row(l), padded(k)}, y{up_t.row(rank), padded(k)};
        const Matrix<float> left_f{y.row(l), m}, x{left_f.row(l), n};
        for (int64_t r = 0; r < block.rows; ++r) widen(block.x.row(r), m * n, x.row(r * m));
        multiply_right(x, block.rows * m, {x.row(BLOCK_ROWS * m), STRIP}, h);
        if (rank) transpose<W>({up, rank}, k, rank, up_t);
        widen(left, l * m, left_f.data);
        for (int64_t r = 0; r < block.rows; ++r) {
            combine(left_f, l, h.from(r * m), m, middle(), g);
            if (rank) combine(g, l, up_t, rank, k, y);
            add_weighted<T>({block.y.row(r), k}, rank ? y : g, l, k, block.weight);
        }
        return nullptr;
    }

   private:
    static int64_t quotient(int64_t size, int64_t divisor) {
        return divisor > 0 && size % divisor == 0 ? size / divisor : -1;
    }
    // h (rows, middle) = x (rows, n) times the transpose of D or R, of which a strip at a time is made
    void multiply_right(Matrix<float> x, int64_t rows, Matrix<float> strip, Matrix<float> h) const {
        for (int64_t i = 0; i < middle(); i += STRIP) {
            const int64_t columns = min_of(STRIP, middle() - i);
            transpose<W>({right + i * n, n}, columns, n, strip);
            combine(x, rows, strip, n, columns, h.from(0, i));
        }
    }

    int64_t middle() const { return rank ? rank : k; }
    int64_t width() const { return padded(middle()); }
};

#ifdef HAS_AMX

// The same, by a worker of each thread.
struct TiledKronecker : Kronecker<bfloat16, bfloat16> {
    using Kronecker::Kronecker;
    static constexpr int64_t BLOCK_ROWS = 8;

    struct Room {
        KroneckerTiles::Room tiles;
        int64_t floats = 0;  // for factored R
        friend Room max_of(const Room& a, const Room& b) {
            return {max_of(a.tiles, b.tiles), max_of(a.floats, b.floats)};
        }
    };

    class Worker {
      public:
        explicit Worker(const Room& room) : tiles(room.tiles), scratch(new float[room.floats]) {}

        const char* take(const TiledKronecker& op, const Block<bfloat16>& block, Ahead ahead) {
            if (op.rank) return op.compute(block, scratch.get());
            tiles.take(op.whole(), block, ahead);
            return nullptr;
        }
        void finish() { tiles.finish(); }

      private:
        KroneckerTiles tiles;
        std::unique_ptr<float[]> scratch;
    };

    Room scratch() const {
        if (rank) return {{}, Kronecker::scratch()};
        return {KroneckerTiles::room(whole())};
    }
    Ahead reads(const Block<bfloat16>&) const {
        if (rank) return {};
        return {left, l * m, right, k * n};
    }

  private:
    WholeFactors whole() const { return {l, m, k, n, left, right}; }
};

#endif

template <class T>
const char* add_kronecker(const LinearCall<T>& call) {
#ifdef HAS_AMX
    if constexpr (std::is_same_v<T, bfloat16>)
        if (matrix_unit()) return correct_linear<TiledKronecker, T>(call);
#endif
    return correct_linear<Kronecker<T, T>, T>(call);
}

}  // namespace

EXPORT_CORRECTION(add_kronecker_float32, float, add_kronecker<float>)
EXPORT_CORRECTION(add_kronecker_bfloat16, bfloat16, add_kronecker<bfloat16>)
