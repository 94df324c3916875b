// Large buffers on large pages. Every call has fresh ones, and the kernel's work on 4 KiB pages is a hundredth of a
// call.

#include <cstdint>

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

// A hint: it fails where the system knows no large pages, and nothing is different then.
void advise_huge_pages(const at::Tensor &x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto data = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page, end = (data + x.nbytes()) / page * page;
  if (begin < end) {
    madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

} // namespace

TORCH_LIBRARY_FRAGMENT(copd_kernels, m) { m.def("advise_huge_pages(Tensor x) -> ()"); }

TORCH_LIBRARY_IMPL(copd_kernels, CPU, m) { m.impl("advise_huge_pages", &advise_huge_pages); }
