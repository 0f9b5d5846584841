#include "kernels/base/machine.h"

#include <sched.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <sstream>
#include <system_error>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"

namespace headstart {
namespace {

// Empty where there is no such file.
std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// The number that `text` begins with; nothing for "max" and the like.
std::optional<int64_t> Number(absl::string_view text) {
  const std::vector<absl::string_view> words =
      absl::StrSplit(text, absl::ByAnyChar(" \t\n"), absl::SkipEmpty());
  int64_t number = 0;
  if (words.empty() || !absl::SimpleAtoi(words[0], &number)) return std::nullopt;
  return number;
}

// Of lines "name number" or "name: number kB", the number of `name`; 0 where it is missing.
int64_t NumberOf(absl::string_view text, absl::string_view name) {
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (!absl::ConsumePrefix(&line, name)) continue;
    absl::ConsumePrefix(&line, ":");
    if (!absl::StartsWith(line, " ")) continue;
    return Number(line).value_or(0);
  }
  return 0;
}

bool ListHas(absl::string_view list, absl::string_view word) {
  const std::vector<absl::string_view> words = absl::StrSplit(list, ',');
  return std::find(words.begin(), words.end(), word) != words.end();
}

// Where a hierarchy is mounted, and which of its groups is seen there.
struct CgroupMount {
  std::string point, group;
};

// `controller`: of a v1 hierarchy; empty: v2's.
std::optional<CgroupMount> FindMount(const std::string& root, absl::string_view controller) {
  const std::string mounts = ReadAll(root + "/proc/self/mountinfo");
  for (const absl::string_view line : absl::StrSplit(mounts, '\n')) {
    // id parent device group point options … - type source options
    const std::pair<absl::string_view, absl::string_view> halves =
        absl::StrSplit(line, absl::MaxSplits(" - ", 1));
    const std::vector<std::string> place = absl::StrSplit(halves.first, ' ');
    const std::vector<absl::string_view> kind = absl::StrSplit(halves.second, ' ');
    if (place.size() < 5 || kind.size() < 3) continue;
    const bool fits = controller.empty() ? kind[0] == "cgroup2"
                                         : kind[0] == "cgroup" && ListHas(kind[2], controller);
    if (fits) return CgroupMount{place[4], place[3]};
  }
  return std::nullopt;
}

// The group of this process in a hierarchy, as /proc/self/cgroup has it: id:controllers:path.
std::optional<std::string> FindGroup(const std::string& root, absl::string_view controller) {
  const std::string groups = ReadAll(root + "/proc/self/cgroup");
  for (const absl::string_view line : absl::StrSplit(groups, '\n')) {
    const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() < 3) continue;
    const bool fits =
        controller.empty() ? parts[0] == "0" && parts[1].empty() : ListHas(parts[1], controller);
    if (fits) return parts[2];
  }
  return std::nullopt;
}

// The folders of this process's group and of those above it, as far as they can be seen.
std::vector<std::string> GroupFolders(const std::string& root, absl::string_view controller) {
  const std::optional<CgroupMount> mount = FindMount(root, controller);
  const std::optional<std::string> group = FindGroup(root, controller);
  if (!mount || !group) return {};
  absl::string_view below = *group;
  // Of a container that is told the whole path but sees only its own part of the tree.
  const bool inside = mount->group == "/" || absl::ConsumePrefix(&below, mount->group);
  if (!inside || absl::StrContains(below, "..")) below = "";
  below = absl::StripSuffix(below, "/");
  std::vector<std::string> folders;
  while (true) {
    folders.push_back(absl::StrCat(root, mount->point, below));
    if (below.empty()) return folders;
    below = below.substr(0, below.rfind('/'));
  }
}

// CPUs' worth of time per period; nothing when there is no limit.
std::optional<double> CpuQuota(const std::string& root) {
  std::optional<double> least;
  const auto add = [&](std::optional<int64_t> quota, std::optional<int64_t> period) {
    if (!quota || !period || *quota <= 0 || *period <= 0) return;
    const double cpus = static_cast<double>(*quota) / static_cast<double>(*period);
    least = std::min(least.value_or(cpus), cpus);
  };
  for (const std::string& folder : GroupFolders(root, "")) {
    const std::string text = ReadAll(folder + "/cpu.max");  // quota or max, period
    const std::vector<absl::string_view> words =
        absl::StrSplit(text, absl::ByAnyChar(" \n"), absl::SkipEmpty());
    if (words.size() == 2) add(Number(words[0]), Number(words[1]));
  }
  for (const std::string& folder : GroupFolders(root, "cpu")) {
    add(Number(ReadAll(folder + "/cpu.cfs_quota_us")),
        Number(ReadAll(folder + "/cpu.cfs_period_us")));
  }
  return least;
}

// What a group's limit leaves; `prefix` of the counts of its page cache.
std::optional<FreeMemory> LeftOf(const std::string& folder, const char* limit_file,
                                 const char* usage_file, const char* prefix) {
  const std::optional<int64_t> limit = Number(ReadAll(absl::StrCat(folder, "/", limit_file)));
  const std::optional<int64_t> usage = Number(ReadAll(absl::StrCat(folder, "/", usage_file)));
  if (!limit || !usage) return std::nullopt;
  const std::string counts = ReadAll(folder + "/memory.stat");
  const int64_t cache = NumberOf(counts, absl::StrCat(prefix, "inactive_file")) +
                        NumberOf(counts, absl::StrCat(prefix, "active_file"));
  const int64_t used = std::max(*usage - cache, int64_t{0});
  return FreeMemory{std::max(*limit - used, int64_t{0}),
                    absl::StrCat("the limit of ", *limit, " bytes in ", folder, "/", limit_file)};
}

// In words, what may keep a process from having more threads.
std::string ThreadLimits() {
  std::string limits;
  rlimit processes{};
  if (getrlimit(RLIMIT_NPROC, &processes) == 0 && processes.rlim_cur != RLIM_INFINITY) {
    absl::StrAppend(&limits, "; ulimit -u is ", processes.rlim_cur);
  }
  rlimit memory{};
  if (getrlimit(RLIMIT_AS, &memory) == 0 && memory.rlim_cur != RLIM_INFINITY) {
    absl::StrAppend(&limits, "; ulimit -v is ", memory.rlim_cur >> 10);
  }
  for (const char* controller : {"", "pids"}) {
    for (const std::string& folder : GroupFolders("", controller)) {
      const std::optional<int64_t> most = Number(ReadAll(folder + "/pids.max"));
      if (most) absl::StrAppend(&limits, "; ", folder, "/pids.max is ", *most);
    }
  }
  return limits;
}

}  // namespace

int32_t UsableCpus(const std::string& root) {
  cpu_set_t mask;
  const int32_t cpus = sched_getaffinity(0, sizeof(mask), &mask) == 0
                           ? CPU_COUNT(&mask)
                           : static_cast<int32_t>(std::thread::hardware_concurrency());
  const double quota = CpuQuota(root).value_or(cpus);
  return std::clamp(static_cast<int32_t>(quota), 1, std::max(cpus, 1));
}

std::optional<FreeMemory> FindFreeMemory(const std::string& root) {
  std::optional<FreeMemory> least;
  const auto add = [&](std::optional<FreeMemory> left) {
    if (left && (!least || left->bytes < least->bytes)) least = std::move(left);
  };
  const int64_t available_kb = NumberOf(ReadAll(root + "/proc/meminfo"), "MemAvailable");
  if (available_kb > 0) add(FreeMemory{available_kb << 10, "the machine's memory"});
  for (const std::string& folder : GroupFolders(root, "")) {
    add(LeftOf(folder, "memory.max", "memory.current", ""));
  }
  for (const std::string& folder : GroupFolders(root, "memory")) {
    add(LeftOf(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"));
  }
  return least;
}

absl::Status CheckThreads(int32_t count) {
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  absl::Status status;
  try {
    while (static_cast<int32_t>(threads.size()) < count) {
      threads.emplace_back([&done] { done.wait(false); });
    }
  } catch (const std::system_error& error) {
    status = absl::ResourceExhaustedError(absl::StrCat("of ", count, " threads only ",
                                                       threads.size(), " can be had (",
                                                       error.what(), ThreadLimits(), ")"));
  }
  done = true;
  done.notify_all();
  for (std::thread& thread : threads) thread.join();
  return status;
}

}  // namespace headstart
