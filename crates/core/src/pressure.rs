//! Automatic pauses when memory or disk space is short: which project is paused, when, and how often.
//!
//! ```text
//!             some_avg10 >= threshold            settle_ms later, still so
//!   none ──────────────────────────► episode ───────────────────────► pause the next largest
//!    ▲       pause the largest          │
//!    └── some_avg10 < 0.8 threshold ◄───┘        the same for a disk, with every project on it at once
//! ```
//!
//! Two bounds keep it from flapping: the time between two automatic pauses of one project, and the number of automatic
//! pauses in an hour. A pause beyond them is withheld, which is reported once per episode.
//!
//! A pause that has failed is taken back ([`PressureHistory::pause_failed`]): it does not count for the bounds, and is
//! retried, each time after twice the wait.

use std::collections::{BTreeMap, BTreeSet};

use fermata_protocol::pause::PauseCause;
use fermata_protocol::{ProjectName, UnixMillis};

const HOUR_MS: i64 = 3_600_000;

/// Thresholds and bounds; no resource is watched by default.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PressureRules {
    /// The percentage of the last ten seconds in which some task waited for memory (`some avg10` of the kernel's
    /// pressure stall information) from which on a project is paused.
    pub memory_some_avg10: Option<f64>,
    /// The free bytes of a file system below which the projects on it are paused.
    pub disk_free_bytes: Option<u64>,
    /// The time that a pause has to take effect before the next project is paused for memory.
    pub settle_ms: i64,
    /// The shortest time between two automatic pauses of one project.
    pub apart_ms: i64,
    /// The most automatic pauses in an hour.
    pub max_per_hour: usize,
}

/// A file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskReading {
    pub device: u64,
    /// A directory on it, for messages.
    pub path: String,
    /// What is free for unprivileged users.
    pub free_bytes: u64,
}

/// What was measured of the machine.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PressureReading {
    /// In percent; none where it cannot be read.
    pub memory_some_avg10: Option<f64>,
    /// The file systems of the projects.
    pub disks: Vec<DiskReading>,
}

/// An active project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PressureCandidate {
    pub project: ProjectName,
    /// What its agents use.
    pub memory_bytes: u64,
    /// What its agents have written to disks.
    pub written_bytes: u64,
    /// The file systems that it writes to.
    pub devices: BTreeSet<u64>,
}

/// An automatic pause that is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PressureDecision {
    pub project: ProjectName,
    pub cause: PauseCause,
    /// A sentence for people.
    pub reason: String,
    /// Why the pause is withheld; none where it is made.
    pub withheld: Option<String>,
    /// The file system that is short; memory when none.
    device: Option<u64>,
}

/// The automatic pauses so far, and the episodes that last.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PressureHistory {
    memory: Option<Episode>,
    disks: BTreeMap<u64, Episode>,
    /// The pauses that still count for a bound.
    pauses: Vec<(UnixMillis, ProjectName)>,
}

/// A time of pressure on one resource, from the threshold until clearly below it.
#[derive(Debug, Clone, PartialEq, Default)]
struct Episode {
    /// When a project was last paused.
    last: Option<UnixMillis>,
    /// Projects that were paused, or whose pause was withheld.
    handled: BTreeSet<ProjectName>,
    /// Projects whose pause has failed: how often, and when it may be retried.
    failed: BTreeMap<ProjectName, (u32, UnixMillis)>,
}

impl Episode {
    fn may_pause(&self, project: &ProjectName, now: UnixMillis) -> bool {
        self.failed.get(project).is_none_or(|(_, again_at)| now >= *again_at)
    }
}

impl PressureHistory {
    /// Takes back a pause that has failed, so that it is retried. Returns whether it is the project's first failure in
    /// this episode, which is to be reported.
    pub fn pause_failed(&mut self, rules: &PressureRules, decision: &PressureDecision, now: UnixMillis) -> bool {
        if let Some(last) = self.pauses.iter().rposition(|(_, project)| *project == decision.project) {
            self.pauses.remove(last);
        }
        let episode = match decision.device {
            Some(device) => self.disks.entry(device).or_default(),
            None => self.memory.get_or_insert_default(),
        };
        // No project was paused, so that the next pause need not wait for an effect.
        episode.last = None;
        episode.handled.remove(&decision.project);
        let (times, again_at) = episode.failed.entry(decision.project.clone()).or_insert((0, now));
        let wait = rules.settle_ms.saturating_mul(1_i64 << (*times).min(30)).min(rules.apart_ms.max(rules.settle_ms));
        *times = times.saturating_add(1);
        *again_at = UnixMillis(now.0.saturating_add(wait));
        *times == 1
    }
}

impl PressureReading {
    /// Says whether a threshold is reached, so that the candidates have to be found.
    pub fn is_pressed(&self, rules: &PressureRules) -> bool {
        self.memory_pressure(rules).is_some() || self.disks.iter().any(|disk| is_low(disk, rules))
    }

    fn memory_pressure(&self, rules: &PressureRules) -> Option<(f64, f64)> {
        let (now, bound) = (self.memory_some_avg10?, rules.memory_some_avg10?);
        (now >= bound).then_some((now, bound))
    }
}

fn is_low(disk: &DiskReading, rules: &PressureRules) -> bool {
    rules.disk_free_bytes.is_some_and(|floor| disk.free_bytes < floor)
}

/// Decides which pauses are due now. `candidates` may be empty while [`PressureReading::is_pressed`] is false.
pub fn decide(
    rules: &PressureRules,
    reading: &PressureReading,
    candidates: &[PressureCandidate],
    history: &mut PressureHistory,
    now: UnixMillis,
) -> Vec<PressureDecision> {
    let keep = rules.apart_ms.max(HOUR_MS);
    history.pauses.retain(|(at, _)| now.since(*at) < keep);
    let mut decisions = Vec::new();
    decisions.extend(decide_memory(rules, reading, candidates, history, now));
    decide_disks(rules, reading, candidates, history, now, &mut decisions);
    decisions
}

fn decide_memory(
    rules: &PressureRules,
    reading: &PressureReading,
    candidates: &[PressureCandidate],
    history: &mut PressureHistory,
    now: UnixMillis,
) -> Option<PressureDecision> {
    let Some((some, bound)) = reading.memory_pressure(rules) else {
        let gone = reading.memory_some_avg10.zip(rules.memory_some_avg10).is_none_or(|(now, bound)| now < bound * 0.8);
        if gone {
            history.memory = None;
        }
        return None;
    };
    let mut episode = history.memory.take().unwrap_or_default();
    let decision = if episode.last.is_some_and(|last| now.since(last) < rules.settle_ms) {
        None
    } else {
        let mut by_size: Vec<&PressureCandidate> =
            candidates.iter().filter(|one| one.memory_bytes > 0 && episode.may_pause(&one.project, now)).collect();
        by_size.sort_by_key(|one| std::cmp::Reverse(one.memory_bytes));
        let allowed = by_size.iter().find(|one| bounded(rules, history, &one.project, now).is_none());
        allowed.or(by_size.first()).and_then(|one| {
            let reason = format!(
                "memory is short: tasks waited for it in {some:.1} % of the last ten seconds (bound {bound:.1}), \
                 and the project uses the most, {} MiB",
                one.memory_bytes >> 20
            );
            decide_project(rules, history, &mut episode, one, (None, reason), now)
        })
    };
    history.memory = Some(episode);
    decision
}

fn decide_disks(
    rules: &PressureRules,
    reading: &PressureReading,
    candidates: &[PressureCandidate],
    history: &mut PressureHistory,
    now: UnixMillis,
    decisions: &mut Vec<PressureDecision>,
) {
    let floor = rules.disk_free_bytes.unwrap_or(0);
    // A tenth above the floor, so that small fluctuations begin no new episode.
    let clear = floor.saturating_add(floor / 10);
    let lasts = |device: &u64| reading.disks.iter().any(|disk| disk.device == *device && disk.free_bytes < clear);
    history.disks.retain(|device, _| floor > 0 && lasts(device));
    for disk in reading.disks.iter().filter(|disk| is_low(disk, rules)) {
        let mut episode = history.disks.remove(&disk.device).unwrap_or_default();
        let mut on_it: Vec<&PressureCandidate> =
            candidates.iter().filter(|one| one.devices.contains(&disk.device)).collect();
        // The most active writer first: the checkpoint of a pause needs some room itself.
        on_it.sort_by_key(|one| std::cmp::Reverse(one.written_bytes));
        for one in on_it {
            // A person has resumed the project after its pause in this episode.
            if episode.handled.contains(&one.project) || decisions.iter().any(|other| other.project == one.project) {
                continue;
            }
            if !episode.may_pause(&one.project, now) {
                continue;
            }
            let reason = format!(
                "the file system of {} has {} MiB free, less than {} MiB",
                disk.path,
                disk.free_bytes >> 20,
                floor >> 20
            );
            decisions.extend(decide_project(rules, history, &mut episode, one, (Some(disk.device), reason), now));
        }
        history.disks.insert(disk.device, episode);
    }
}

/// Makes the decision for one project. A pause that a bound withholds is reported once per episode.
fn decide_project(
    rules: &PressureRules,
    history: &mut PressureHistory,
    episode: &mut Episode,
    candidate: &PressureCandidate,
    (device, reason): (Option<u64>, String),
    now: UnixMillis,
) -> Option<PressureDecision> {
    let project = candidate.project.clone();
    let withheld = bounded(rules, history, &project, now);
    let first = episode.handled.insert(project.clone());
    match &withheld {
        Some(_) if !first => return None,
        Some(_) => {}
        None => {
            episode.last = Some(now);
            history.pauses.push((now, project.clone()));
        }
    }
    let cause = if device.is_some() { PauseCause::DiskSpace } else { PauseCause::MemoryPressure };
    Some(PressureDecision { project, cause, reason, withheld, device })
}

/// Returns the bound that withholds an automatic pause of the project now.
fn bounded(rules: &PressureRules, history: &PressureHistory, project: &ProjectName, now: UnixMillis) -> Option<String> {
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

    const RULES: PressureRules = PressureRules {
        memory_some_avg10: Some(40.0),
        disk_free_bytes: Some(1_000 << 20),
        settle_ms: 15_000,
        apart_ms: 600_000,
        max_per_hour: 3,
    };

    fn name(text: &str) -> ProjectName {
        ProjectName::new(text).expect("valid")
    }

    fn candidate(project: &str, memory: u64, written: u64, device: u64) -> PressureCandidate {
        PressureCandidate {
            project: name(project),
            memory_bytes: memory,
            written_bytes: written,
            devices: [device].into(),
        }
    }

    fn all() -> Vec<PressureCandidate> {
        vec![candidate("small", 10, 900, 1), candidate("large", 30, 100, 1), candidate("other", 20, 0, 2)]
    }

    fn memory(percent: f64) -> PressureReading {
        PressureReading { memory_some_avg10: Some(percent), disks: Vec::new() }
    }

    fn disk(device: u64, free_mib: u64) -> PressureReading {
        let disk = DiskReading { device, path: "/srv".into(), free_bytes: free_mib << 20 };
        PressureReading { memory_some_avg10: Some(0.0), disks: vec![disk] }
    }

    /// Checks the decisions at each moment: a name stands for a pause, `!name` for a pause that is withheld.
    fn play(rules: &PressureRules, moments: &[(i64, PressureReading, &[&str])]) {
        let mut history = PressureHistory::default();
        for (seconds, reading, expected) in moments {
            let decisions = decide(rules, reading, &all(), &mut history, UnixMillis(seconds * 1_000));
            let done: Vec<String> = decisions
                .iter()
                .map(|v| format!("{}{}", if v.withheld.is_some() { "!" } else { "" }, v.project))
                .collect();
            assert_eq!(done, *expected, "at {seconds} s: {decisions:?}");
        }
    }

    #[test]
    fn nothing_is_paused_by_default() {
        let mut reading = disk(1, 0);
        reading.memory_some_avg10 = Some(100.0);
        assert!(!reading.is_pressed(&PressureRules::default()));
        play(&PressureRules::default(), &[(0, reading, &[])]);
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
    fn a_project_is_not_paused_again_for_a_while_and_that_is_recorded_once() {
        let rules = PressureRules { max_per_hour: 100, ..RULES };
        play(
            &rules,
            &[
                (0, memory(50.0), &["large"]),
                (20, memory(50.0), &["other"]),
                (40, memory(50.0), &["small"]),
                // All were resumed, and the pressure lasts: nothing is recorded for those that it has paused.
                (60, memory(50.0), &[]),
                (70, memory(0.0), &[]),
                // New pressure: recorded once.
                (80, memory(50.0), &["!large"]),
                (100, memory(50.0), &[]),
                (601, memory(50.0), &["large"]),
            ],
        );
    }

    #[test]
    fn the_pauses_of_an_hour_are_limited() {
        let rules = PressureRules { apart_ms: 1_000, max_per_hour: 2, ..RULES };
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
                // Slightly more than the floor does not end the shortage.
                (6, disk(1, 1_050), &[]),
                (8, disk(1, 900), &[]),
                (10, disk(1, 1_200), &[]),
                (12, disk(1, 900), &["!small", "!large"]),
                (14, disk(2, 10), &["other"]),
            ],
        );
    }

    fn paused(
        rules: &PressureRules,
        history: &mut PressureHistory,
        seconds: i64,
        reading: &PressureReading,
    ) -> Vec<PressureDecision> {
        let decisions = decide(rules, reading, &all(), history, UnixMillis(seconds * 1_000));
        decisions.into_iter().filter(|decision| decision.withheld.is_none()).collect()
    }

    #[test]
    fn a_pause_for_memory_that_could_not_be_made_does_not_count() {
        let rules = PressureRules { max_per_hour: 1, ..RULES };
        let (mut history, pressed) = (PressureHistory::default(), memory(50.0));
        let mut attempt = |seconds: i64, fails: bool| {
            let decision = paused(&rules, &mut history, seconds, &pressed).pop()?;
            let recorded = fails && history.pause_failed(&rules, &decision, UnixMillis(seconds * 1_000));
            Some((decision.project.to_string(), recorded))
        };
        assert_eq!(attempt(0, true), Some(("large".into(), true)));
        // After a failed pause the next one does not wait for its effect.
        assert_eq!(attempt(2, true), Some(("other".into(), true)));
        assert_eq!(attempt(4, true), Some(("small".into(), true)));
        assert_eq!(attempt(14, true), None);
        assert_eq!(attempt(15, true), Some(("large".into(), false)), "recorded once");
        assert_eq!(attempt(44, false), Some(("other".into(), false)), "after twice as long for large");
        assert_eq!(attempt(60, false), None, "the limit of this hour is reached");
    }

    #[test]
    fn a_failed_pause_for_a_disk_is_tried_again_and_the_others_are_not() {
        let (mut history, low) = (PressureHistory::default(), disk(1, 10));
        let decisions = paused(&RULES, &mut history, 0, &low);
        assert_eq!(decisions.len(), 2);
        assert!(history.pause_failed(&RULES, &decisions[0], UnixMillis(0)));
        assert_eq!(paused(&RULES, &mut history, 14, &low), []);
        let again = paused(&RULES, &mut history, 15, &low);
        assert_eq!(again.iter().map(|v| &v.project).collect::<Vec<_>>(), [&decisions[0].project]);
        assert!(!history.pause_failed(&RULES, &again[0], UnixMillis(15_000)), "recorded once");
        assert_eq!(paused(&RULES, &mut history, 44, &low), []);
        assert_eq!(paused(&RULES, &mut history, 45, &low).len(), 1);
        assert_eq!(paused(&RULES, &mut history, 500, &low), [], "the last try succeeded");
    }

    #[test]
    fn reasons_name_the_numbers() {
        let mut history = PressureHistory::default();
        let decisions = decide(&RULES, &memory(55.25), &all(), &mut history, UnixMillis(0));
        assert!(decisions[0].reason.contains("55.2 %") && decisions[0].reason.contains("40.0"), "{decisions:?}");
        let decisions = decide(&RULES, &disk(2, 7), &all(), &mut history, UnixMillis(0));
        assert!(decisions[0].reason.contains("/srv has 7 MiB free, less than 1000 MiB"), "{decisions:?}");
    }

    proptest! {
        #![proptest_config(fermata_test_seeds::cases(256))]

        #[test]
        fn a_project_is_paused_rarely_and_only_under_pressure(steps in prop::collection::vec((0i64..400, 0.0f64..100.0, 0u64..3_000), 1..200)) {
            let mut history = PressureHistory::default();
            let mut now = 0;
            let mut pauses: Vec<(i64, ProjectName)> = Vec::new();
            for (seconds, percent, free) in steps {
                now += seconds * 1_000;
                let mut reading = disk(1, free);
                reading.memory_some_avg10 = Some(percent);
                for decision in decide(&RULES, &reading, &all(), &mut history, UnixMillis(now)) {
                    let pressed = percent >= 40.0 || free < 1_000;
                    prop_assert!(pressed, "nothing pressed");
                    if decision.withheld.is_none() {
                        pauses.push((now, decision.project));
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
