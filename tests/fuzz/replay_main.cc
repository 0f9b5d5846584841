// Runs a fuzz target over files and folders of inputs: keeps the corpus in the tests of compilers
// that have no libFuzzer. Usage: NAME_replay PATH…
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

bool Replay(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> input{std::istreambuf_iterator<char>(file),
                                std::istreambuf_iterator<char>()};
  if (file.bad() || !file.is_open()) return false;
  std::printf("%s: %zu bytes\n", path.c_str(), input.size());
  std::fflush(stdout);  // so that a crash is the last name's
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  int num_inputs = 0;
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(argv[i])) {
      if (!entry.is_regular_file()) continue;
      if (!Replay(entry.path())) {
        std::fprintf(stderr, "can't read %s\n", entry.path().c_str());
        return 1;
      }
      ++num_inputs;
    }
  }
  if (num_inputs > 0) return 0;
  std::fprintf(stderr, "no inputs; usage: %s FOLDER...\n", argv[0]);
  return 2;
}
