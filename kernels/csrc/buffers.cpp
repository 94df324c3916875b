// Large buffers that are used again. Every call wants a workspace and a weight gradient of a hundred megabytes and
// more, and pages that are fresh from the system are cleared when first touched.

#include <cstdint>
#include <cstdlib>
#include <list>
#include <mutex>

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr size_t kPage = size_t{2} << 20; // a large page
// What is kept while nobody uses it.
constexpr size_t kMostKept = size_t{384} << 20;

struct Block {
  void *data;
  size_t size;
};

class Pool final : public c10::Allocator {
public:
  c10::DataPtr allocate(size_t num_bytes) override {
    const size_t size = (num_bytes + kPage - 1) / kPage * kPage;
    Block block = take(size);
    if (block.data == nullptr) {
      block = {std::aligned_alloc(kPage, size), size};
      TORCH_CHECK_WITH(OutOfMemoryError, block.data != nullptr, "no memory for a buffer of ", num_bytes, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      // A hint: it fails where the system knows no large pages, and nothing is different then.
      madvise(block.data, size, MADV_HUGEPAGE);
#endif
    }
    return {block.data, new Block(block), &give_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void *to, const void *from, size_t num_bytes) const override {
    default_copy_data(to, from, num_bytes);
  }

  // Bytes that were kept.
  int64_t clear() {
    const std::lock_guard lock(mutex_);
    const size_t num_bytes = num_kept_;
    drop_until(0);
    return static_cast<int64_t>(num_bytes);
  }

private:
  static void give_back(void *context);

  // The smallest kept block that is large enough, and not by more than a quarter.
  Block take(size_t size) {
    const std::lock_guard lock(mutex_);
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      if (it->size >= size && it->size <= size + size / 4 && (best == kept_.end() || it->size < best->size)) {
        best = it;
      }
    }
    if (best == kept_.end()) {
      return {nullptr, 0};
    }
    const Block block = *best;
    num_kept_ -= block.size;
    kept_.erase(best);
    return block;
  }

  void keep(Block block) {
    const std::lock_guard lock(mutex_);
    kept_.push_back(block);
    num_kept_ += block.size;
    drop_until(kMostKept);
  }

  void drop_until(size_t most) {
    while (num_kept_ > most) {
      num_kept_ -= kept_.front().size;
      std::free(kept_.front().data);
      kept_.pop_front();
    }
  }

  std::mutex mutex_;
  std::list<Block> kept_; // oldest first
  size_t num_kept_ = 0;
};

Pool &pool() {
  // Never destroyed: tensors may outlive every static object.
  static auto *const instance = new Pool;
  return *instance;
}

void Pool::give_back(void *context) {
  auto *const block = static_cast<Block *>(context);
  pool().keep(*block);
  delete block;
}

at::Tensor pooled_empty(at::IntArrayRef size, at::ScalarType dtype) {
  return at::detail::empty_generic(size, &pool(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

} // namespace

TORCH_LIBRARY_FRAGMENT(copd_kernels, m) {
  m.def("pooled_empty(int[] size, ScalarType dtype) -> Tensor", &pooled_empty);
  m.def("empty_cache() -> int", [] { return pool().clear(); });
}
