//! Automatic pauses for want of memory or disk: which project, when, and when not (again).
//!
//! ```text
//!             some_avg10 >= threshold          settled, still pressed
//!   calm ──────────────────────────► pressed ──────────────────────► pause the next largest
//!    ▲       pause the largest          │
//!    └── some_avg10 < 0.8 threshold ◄───┘        the same for a disk, with every project on it at once
//! ```
//!
//! Two bounds keep it from flapping: a project that was paused so is left alone for a while, and
//! there are only so many automatic pauses in an hour. Beyond them it is only told, once while the
//! pressure lasts.
//!
//! A pause that could not be made is taken back ([`History::not_made`]): it bounds nothing, and is tried
//! again, each time after twice as long.

use std::collections::{BTreeMap, BTreeSet};

use fermata_protocol::pause::PauseCause;
use fermata_protocol::{ProjectName, UnixMillis};

const HOUR_MS: i64 = 3_600_000;

/// What is watched and what bounds it; nothing is watched by default.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rules {
    /// At how many percent of the last ten seconds in which some task waited for memory (`some avg10`
    /// of the kernel's pressure stall information) a project is paused.
    pub memory_some_avg10: Option<f64>,
    /// Below how many free bytes of a file system the projects on it are paused.
    pub disk_free_bytes: Option<u64>,
    /// How long a pause is given to take effect before the next project is paused for memory,
    /// milliseconds.
    pub settle_ms: i64,
    /// How long a project is left alone after such a pause, milliseconds.
    pub apart_ms: i64,
    /// How many such pauses there are in an hour at most.
    pub max_per_hour: usize,
}

/// A file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its device number.
    pub device: u64,
    /// A directory on it, for people.
    pub path: String,
    /// What is free on it for everybody, bytes.
    pub free_bytes: u64,
}

/// What the machine says.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Reading {
    /// `some avg10` of memory, percent; none where it cannot be read.
    pub memory_some_avg10: Option<f64>,
    /// The file systems of the projects.
    pub disks: Vec<Disk>,
}

/// An active project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub project: ProjectName,
    /// What its agents use, bytes.
    pub memory_bytes: u64,
    /// What they have written to disks, bytes.
    pub written_bytes: u64,
    /// The file systems that it writes to.
    pub devices: BTreeSet<u64>,
}

/// What is to be done about one project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The project.
    pub project: ProjectName,
    /// Why.
    pub cause: PauseCause,
    /// A sentence for people.
    pub reason: String,
    /// Whether it is paused, or why it is only told.
    pub withheld: Option<String>,
    /// Which disk it is for; memory when none.
    device: Option<u64>,
}

/// What has happened so far.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct History {
    memory: Option<Episode>,
    disks: BTreeMap<u64, Episode>,
    /// The pauses of the last hour, and those that still keep their projects from the next one.
    pauses: Vec<(UnixMillis, ProjectName)>,
}

/// A time of pressure, from its beginning until it has clearly gone.
#[derive(Debug, Clone, PartialEq, Default)]
struct Episode {
    /// When a project was last paused for it.
    last: Option<UnixMillis>,
    /// Those that were paused or told about.
    seen: BTreeSet<ProjectName>,
    /// Those whose pause could not be made: how often, and when they may be tried again.
    failed: BTreeMap<ProjectName, (u32, UnixMillis)>,
}

impl Episode {
    fn may_try(&self, project: &ProjectName, now: UnixMillis) -> bool {
        self.failed.get(project).is_none_or(|(_, again_at)| now >= *again_at)
    }
}

impl History {
    /// Takes back a pause that could not be made, so that it is tried again; says whether it is the
    /// project's first in this time of pressure, which is to be told.
    pub fn not_made(&mut self, rules: &Rules, verdict: &Verdict, now: UnixMillis) -> bool {
        if let Some(last) = self.pauses.iter().rposition(|(_, project)| *project == verdict.project) {
            self.pauses.remove(last);
        }
        let episode = match verdict.device {
            Some(device) => self.disks.entry(device).or_default(),
            None => self.memory.get_or_insert_default(),
        };
        // Nothing was paused whose effect the next one would have to wait for.
        episode.last = None;
        episode.seen.remove(&verdict.project);
        let (times, again_at) = episode.failed.entry(verdict.project.clone()).or_insert((0, now));
        let wait = rules.settle_ms.saturating_mul(1_i64 << (*times).min(30)).min(rules.apart_ms.max(rules.settle_ms));
        *times = times.saturating_add(1);
        *again_at = UnixMillis(now.0.saturating_add(wait));
        *times == 1
    }
}

impl Reading {
    /// Says whether anything presses, so that it is worth looking at the projects.
    pub fn presses(&self, rules: &Rules) -> bool {
        self.memory_presses(rules).is_some() || self.disks.iter().any(|disk| is_low(disk, rules))
    }

    fn memory_presses(&self, rules: &Rules) -> Option<(f64, f64)> {
        let (now, bound) = (self.memory_some_avg10?, rules.memory_some_avg10?);
        (now >= bound).then_some((now, bound))
    }
}

fn is_low(disk: &Disk, rules: &Rules) -> bool {
    rules.disk_free_bytes.is_some_and(|floor| disk.free_bytes < floor)
}

/// Decides what is to be done now. `candidates` may be left out while nothing presses.
pub fn judge(
    rules: &Rules,
    reading: &Reading,
    candidates: &[Candidate],
    history: &mut History,
    now: UnixMillis,
) -> Vec<Verdict> {
    let keep = rules.apart_ms.max(HOUR_MS);
    history.pauses.retain(|(at, _)| now.since(*at) < keep);
    let mut verdicts = Vec::new();
    verdicts.extend(judge_memory(rules, reading, candidates, history, now));
    judge_disks(rules, reading, candidates, history, now, &mut verdicts);
    verdicts
}

fn judge_memory(
    rules: &Rules,
    reading: &Reading,
    candidates: &[Candidate],
    history: &mut History,
    now: UnixMillis,
) -> Option<Verdict> {
    let Some((some, bound)) = reading.memory_presses(rules) else {
        let gone = reading.memory_some_avg10.zip(rules.memory_some_avg10).is_none_or(|(now, bound)| now < bound * 0.8);
        if gone {
            history.memory = None;
        }
        return None;
    };
    let mut episode = history.memory.take().unwrap_or_default();
    let verdict = if episode.last.is_some_and(|last| now.since(last) < rules.settle_ms) {
        None
    } else {
        let mut by_size: Vec<&Candidate> =
            candidates.iter().filter(|one| one.memory_bytes > 0 && episode.may_try(&one.project, now)).collect();
        by_size.sort_by_key(|one| std::cmp::Reverse(one.memory_bytes));
        let allowed = by_size.iter().find(|one| bounded(rules, history, &one.project, now).is_none());
        allowed.or(by_size.first()).and_then(|one| {
            let reason = format!(
                "memory is short: tasks waited for it in {some:.1} % of the last ten seconds (bound {bound:.1}), \
                 and the project uses the most, {} MiB",
                one.memory_bytes >> 20
            );
            verdict(rules, history, &mut episode, one, (None, reason), now)
        })
    };
    history.memory = Some(episode);
    verdict
}

fn judge_disks(
    rules: &Rules,
    reading: &Reading,
    candidates: &[Candidate],
    history: &mut History,
    now: UnixMillis,
    verdicts: &mut Vec<Verdict>,
) {
    let floor = rules.disk_free_bytes.unwrap_or(0);
    // A tenth more than the floor, so that a few bytes to and fro begin nothing anew.
    let clear = floor.saturating_add(floor / 10);
    let still = |device: &u64| reading.disks.iter().any(|disk| disk.device == *device && disk.free_bytes < clear);
    history.disks.retain(|device, _| floor > 0 && still(device));
    for disk in reading.disks.iter().filter(|disk| is_low(disk, rules)) {
        let mut episode = history.disks.remove(&disk.device).unwrap_or_default();
        let mut on_it: Vec<&Candidate> = candidates.iter().filter(|one| one.devices.contains(&disk.device)).collect();
        // Those that write the most first: a pause itself needs some room for its checkpoint.
        on_it.sort_by_key(|one| std::cmp::Reverse(one.written_bytes));
        for one in on_it {
            // It was paused for it and a person let it go on: that is an answer.
            if episode.seen.contains(&one.project) || verdicts.iter().any(|other| other.project == one.project) {
                continue;
            }
            if !episode.may_try(&one.project, now) {
                continue;
            }
            let reason = format!(
                "the file system of {} has {} MiB free, less than {} MiB",
                disk.path,
                disk.free_bytes >> 20,
                floor >> 20
            );
            verdicts.extend(verdict(rules, history, &mut episode, one, (Some(disk.device), reason), now));
        }
        history.disks.insert(disk.device, episode);
    }
}

/// A pause, or, where it is bounded, that it is told: once while the pressure lasts.
fn verdict(
    rules: &Rules,
    history: &mut History,
    episode: &mut Episode,
    candidate: &Candidate,
    (device, reason): (Option<u64>, String),
    now: UnixMillis,
) -> Option<Verdict> {
    let project = candidate.project.clone();
    let withheld = bounded(rules, history, &project, now);
    let first = episode.seen.insert(project.clone());
    match &withheld {
        Some(_) if !first => return None,
        Some(_) => {}
        None => {
            episode.last = Some(now);
            history.pauses.push((now, project.clone()));
        }
    }
    let cause = if device.is_some() { PauseCause::DiskSpace } else { PauseCause::MemoryPressure };
    Some(Verdict { project, cause, reason, withheld, device })
}

/// Why a project may not be paused automatically now.
fn bounded(rules: &Rules, history: &History, project: &ProjectName, now: UnixMillis) -> Option<String> {
    let recently = |within: i64| history.pauses.iter().filter(move |(at, _)| now.since(*at) < within);
    if recently(rules.apart_ms).any(|(_, paused)| paused == project) {
        return Some(format!("it was paused automatically less than {} s ago", rules.apart_ms / 1_000));
    }
    let count = recently(HOUR_MS).count();
    (count >= rules.max_per_hour).then(|| format!("there were {count} automatic pauses in the last hour"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: Rules = Rules {
        memory_some_avg10: Some(40.0),
        disk_free_bytes: Some(1_000 << 20),
        settle_ms: 15_000,
        apart_ms: 600_000,
        max_per_hour: 3,
    };

    fn name(text: &str) -> ProjectName {
        ProjectName::new(text).expect("valid")
    }

    fn candidate(project: &str, memory: u64, written: u64, device: u64) -> Candidate {
        Candidate { project: name(project), memory_bytes: memory, written_bytes: written, devices: [device].into() }
    }

    fn all() -> Vec<Candidate> {
        vec![candidate("small", 10, 900, 1), candidate("large", 30, 100, 1), candidate("other", 20, 0, 2)]
    }

    fn memory(percent: f64) -> Reading {
        Reading { memory_some_avg10: Some(percent), disks: Vec::new() }
    }

    fn disk(device: u64, free_mib: u64) -> Reading {
        let disk = Disk { device, path: "/srv".into(), free_bytes: free_mib << 20 };
        Reading { memory_some_avg10: Some(0.0), disks: vec![disk] }
    }

    /// What is done at each moment: a name for a pause, `!name` for what is only told.
    fn play(rules: &Rules, moments: &[(i64, Reading, &[&str])]) {
        let mut history = History::default();
        for (seconds, reading, expected) in moments {
            let verdicts = judge(rules, reading, &all(), &mut history, UnixMillis(seconds * 1_000));
            let done: Vec<String> = verdicts
                .iter()
                .map(|v| format!("{}{}", if v.withheld.is_some() { "!" } else { "" }, v.project))
                .collect();
            assert_eq!(done, *expected, "at {seconds} s: {verdicts:?}");
        }
    }

    #[test]
    fn nothing_is_paused_by_default() {
        let mut reading = disk(1, 0);
        reading.memory_some_avg10 = Some(100.0);
        assert!(!reading.presses(&Rules::default()));
        play(&Rules::default(), &[(0, reading, &[])]);
    }

    #[test]
    fn memory_pauses_the_largest_then_waits_then_the_next() {
        play(
            &RULES,
            &[
                (0, memory(39.9), &[]),
                (2, memory(40.0), &["large"]),
                (4, memory(80.0), &[]),
                (16, memory(80.0), &[]),
                (17, memory(80.0), &["other"]),
                (19, memory(10.0), &[]),
                (60, memory(41.0), &["small"]),
            ],
        );
    }

    #[test]
    fn a_project_is_left_alone_for_a_while_and_told_about_once() {
        let rules = Rules { max_per_hour: 100, ..RULES };
        play(
            &rules,
            &[
                (0, memory(50.0), &["large"]),
                (20, memory(50.0), &["other"]),
                (40, memory(50.0), &["small"]),
                // All were resumed by somebody, and it goes on: told for none that was paused in it.
                (60, memory(50.0), &[]),
                (70, memory(0.0), &[]),
                // A new time of pressure: told once.
                (80, memory(50.0), &["!large"]),
                (100, memory(50.0), &[]),
                (601, memory(50.0), &["large"]),
            ],
        );
    }

    #[test]
    fn an_hour_has_only_so_many() {
        let rules = Rules { apart_ms: 1_000, max_per_hour: 2, ..RULES };
        play(
            &rules,
            &[
                (0, memory(50.0), &["large"]),
                (20, memory(50.0), &["large"]),
                (39, memory(0.0), &[]),
                (40, memory(50.0), &["!large"]),
                (60, memory(50.0), &[]),
                (3_599, memory(50.0), &[]),
                (3_601, memory(50.0), &["large"]),
            ],
        );
    }

    #[test]
    fn a_low_disk_pauses_all_on_it_the_busiest_first_and_each_once() {
        play(
            &RULES,
            &[
                (0, disk(1, 1_000), &[]),
                (2, disk(1, 999), &["small", "large"]),
                (4, disk(1, 500), &[]),
                // A little more than the floor is not enough to begin anew.
                (6, disk(1, 1_050), &[]),
                (8, disk(1, 900), &[]),
                (10, disk(1, 1_200), &[]),
                (12, disk(1, 900), &["!small", "!large"]),
                (14, disk(2, 10), &["other"]),
            ],
        );
    }

    fn paused(rules: &Rules, history: &mut History, seconds: i64, reading: &Reading) -> Vec<Verdict> {
        let verdicts = judge(rules, reading, &all(), history, UnixMillis(seconds * 1_000));
        verdicts.into_iter().filter(|verdict| verdict.withheld.is_none()).collect()
    }

    #[test]
    fn a_pause_for_memory_that_could_not_be_made_does_not_count() {
        let rules = Rules { max_per_hour: 1, ..RULES };
        let (mut history, pressed) = (History::default(), memory(50.0));
        let mut attempt = |seconds: i64, fails: bool| {
            let verdict = paused(&rules, &mut history, seconds, &pressed).pop()?;
            let told = fails && history.not_made(&rules, &verdict, UnixMillis(seconds * 1_000));
            Some((verdict.project.to_string(), told))
        };
        assert_eq!(attempt(0, true), Some(("large".into(), true)));
        // The next one does not wait for an effect that cannot come.
        assert_eq!(attempt(2, true), Some(("other".into(), true)));
        assert_eq!(attempt(4, true), Some(("small".into(), true)));
        assert_eq!(attempt(14, true), None);
        assert_eq!(attempt(15, true), Some(("large".into(), false)), "told once");
        assert_eq!(attempt(44, false), Some(("other".into(), false)), "after twice as long for large");
        assert_eq!(attempt(60, false), None, "the one of this hour was made");
    }

    #[test]
    fn a_pause_for_a_disk_that_could_not_be_made_is_tried_again_and_the_others_stand() {
        let (mut history, low) = (History::default(), disk(1, 10));
        let verdicts = paused(&RULES, &mut history, 0, &low);
        assert_eq!(verdicts.len(), 2);
        assert!(history.not_made(&RULES, &verdicts[0], UnixMillis(0)));
        assert_eq!(paused(&RULES, &mut history, 14, &low), []);
        let again = paused(&RULES, &mut history, 15, &low);
        assert_eq!(again.iter().map(|v| &v.project).collect::<Vec<_>>(), [&verdicts[0].project]);
        assert!(!history.not_made(&RULES, &again[0], UnixMillis(15_000)), "told once");
        assert_eq!(paused(&RULES, &mut history, 44, &low), []);
        assert_eq!(paused(&RULES, &mut history, 45, &low).len(), 1);
        assert_eq!(paused(&RULES, &mut history, 500, &low), [], "it was made at last");
    }

    #[test]
    fn reasons_name_the_numbers() {
        let mut history = History::default();
        let verdicts = judge(&RULES, &memory(55.25), &all(), &mut history, UnixMillis(0));
        assert!(verdicts[0].reason.contains("55.2 %") && verdicts[0].reason.contains("40.0"), "{verdicts:?}");
        let verdicts = judge(&RULES, &disk(2, 7), &all(), &mut history, UnixMillis(0));
        assert!(verdicts[0].reason.contains("/srv has 7 MiB free, less than 1000 MiB"), "{verdicts:?}");
    }

    proptest! {
        #![proptest_config(fermata_test_seeds::cases(256))]

        #[test]
        fn it_never_flaps(steps in prop::collection::vec((0i64..400, 0.0f64..100.0, 0u64..3_000), 1..200)) {
            let mut history = History::default();
            let mut now = 0;
            let mut pauses: Vec<(i64, ProjectName)> = Vec::new();
            for (seconds, percent, free) in steps {
                now += seconds * 1_000;
                let mut reading = disk(1, free);
                reading.memory_some_avg10 = Some(percent);
                for verdict in judge(&RULES, &reading, &all(), &mut history, UnixMillis(now)) {
                    let pressed = percent >= 40.0 || free < 1_000;
                    prop_assert!(pressed, "nothing pressed");
                    if verdict.withheld.is_none() {
                        pauses.push((now, verdict.project));
                    }
                }
            }
            for (i, (at, project)) in pauses.iter().enumerate() {
                let before = &pauses[..i];
                prop_assert!(before.iter().filter(|(earlier, _)| at - earlier < HOUR_MS).count() < RULES.max_per_hour);
                let same = before.iter().any(|(earlier, other)| other == project && at - earlier < RULES.apart_ms);
                prop_assert!(!same, "{} was paused twice in a row", project);
            }
        }
    }
}
