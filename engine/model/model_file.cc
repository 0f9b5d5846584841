#include "engine/model/model_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

namespace fs = std::filesystem;

absl::Status CantRead(absl::string_view name, int error) {
  return absl::InvalidArgumentError(
      absl::StrCat(name, ": can't be read: ", std::generic_category().message(error)));
}

bool IsInside(const fs::path& path, const fs::path& root) {
  const auto [root_end, unused] = std::mismatch(root.begin(), root.end(), path.begin(), path.end());
  return root_end == root.end();
}

}  // namespace

absl::StatusOr<ModelDir> ModelDir::Open(const std::string& path, Links links) {
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  if (error) return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.message()));
  if (!fs::is_directory(real, error)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a folder"));
  }
  if (links == Links::kAnywhere) return ModelDir(path, "");
  // …/models--org--name/snapshots/<commit>: files are links to ../../blobs/.
  const fs::path entry = real.parent_path().parent_path();
  const bool is_snapshot = real.parent_path().filename() == "snapshots" &&
                           absl::StartsWith(entry.filename().string(), "models--");
  return ModelDir(path, is_snapshot ? entry.string() : real.string());
}

std::string ModelDir::PathOf(absl::string_view name) const {
  return absl::StrCat(path_, absl::EndsWith(path_, "/") ? "" : "/", name);
}

bool ModelDir::Contains(absl::string_view name) const {
  std::error_code ignored;
  return fs::exists(fs::symlink_status(PathOf(name), ignored));
}

absl::StatusOr<std::string> ModelDir::Resolve(absl::string_view name) const {
  const std::string path = PathOf(name);
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  if (error) return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.message()));
  if (!root_.empty() && !IsInside(real, root_)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": is a link to ", real.string(),
                                                   ", outside of ", root_,
                                                   "; --follow-links=true allows such links"));
  }
  return real.string();
}

absl::StatusOr<std::string> ModelDir::ReadText(absl::string_view name, int64_t max_bytes) const {
  HEADSTART_ASSIGN_OR_RETURN(const std::string real, Resolve(name));
  HEADSTART_ASSIGN_OR_RETURN(const ModelFile file, ModelFile::Open(real, PathOf(name)));
  if (file.bytes() > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.name(), ": ", file.bytes(), " bytes, limit ", max_bytes));
  }
  std::string text(static_cast<size_t>(file.bytes()), '\0');
  HEADSTART_RETURN_IF_ERROR(file.Read(0, {reinterpret_cast<std::byte*>(text.data()), text.size()}));
  return text;
}

absl::StatusOr<ModelFile> ModelFile::Open(const std::string& path, std::string name) {
  // Never waits, not even on a pipe.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
  if (fd < 0) return CantRead(name, errno);
  struct stat info {};
  const bool is_regular = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  ModelFile file(fd, is_regular ? static_cast<int64_t>(info.st_size) : 0, std::move(name));
  if (!is_regular)
    return absl::InvalidArgumentError(absl::StrCat(file.name_, ": not a regular file"));
  if (file.bytes_ == 0) return absl::InvalidArgumentError(absl::StrCat(file.name_, ": empty file"));
  HEADSTART_RETURN_IF_ERROR(file.CheckNoPointer());
  return file;
}

absl::Status ModelFile::CheckNoPointer() const {
  constexpr absl::string_view kPointer = "version https://git-lfs.github.com/spec/";
  std::string start(std::min(static_cast<size_t>(bytes_), kPointer.size()), '\0');
  HEADSTART_RETURN_IF_ERROR(Read(0, {reinterpret_cast<std::byte*>(start.data()), start.size()}));
  if (start != kPointer) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name_, ": a Git LFS pointer of ", bytes_,
                   " bytes, not the file itself (git lfs pull gets it)"));
}

absl::Status ModelFile::Read(int64_t offset, absl::Span<std::byte> into) const {
  while (!into.empty()) {
    const ssize_t got = pread(fd_, into.data(), into.size(), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return CantRead(name_, errno);
    if (got == 0) {
      return absl::InvalidArgumentError(absl::StrCat(name_, ": ends at byte ", offset, ", had ",
                                                     bytes_, " bytes when it was opened"));
    }
    offset += got;
    into.remove_prefix(static_cast<size_t>(got));
  }
  return absl::OkStatus();
}

ModelFile::~ModelFile() {
  if (fd_ >= 0) close(fd_);
}

}  // namespace headstart
