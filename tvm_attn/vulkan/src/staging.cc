#include "staging.h"

namespace tvm_attn::vulkan {
namespace {

constexpr VkDeviceSize kAlignment = 64;

}  // namespace

UploadRing::UploadRing(const BufferFactory& factory, Stream* stream)
    : stream_(stream), buffer_(factory.Create(kSize, Use::kUpload)) {}

Slice UploadRing::Reserve(VkDeviceSize size) {
  uint64_t begin = (head_ + kAlignment - 1) / kAlignment * kAlignment;
  if (begin % kSize + size > kSize) begin = (begin / kSize + 1) * kSize;  // a slice does not wrap around
  const uint64_t end = begin + size;
  while (end - tail_ > kSize) {
    if (marks_.front().value == stream_->Next()) stream_->Submit();
    // Next() here means that nothing was recorded after the slice was handed out, so nothing reads it.
    if (marks_.front().value != stream_->Next()) stream_->Wait(marks_.front().value);
    tail_ = marks_.front().end;
    marks_.pop_front();
  }
  head_ = end;
  // Submitting above may have closed a batch; the slice belongs to the batch that its operation will be recorded into.
  const TimelineValue value = stream_->Next();
  if (!marks_.empty() && marks_.back().value == value) {
    marks_.back().end = end;
  } else {
    marks_.push_back({end, value});
  }
  const VkDeviceSize offset = begin % kSize;
  return {buffer_.handle, offset, buffer_.address + offset, buffer_.mapped + offset};
}

ReadbackBuffers::ReadbackBuffers(const BufferFactory& factory) {
  for (Buffer& buffer : buffers_) buffer = factory.Create(kSize, Use::kReadback);
}

}  // namespace tvm_attn::vulkan
