//! Consolidation: many packs become one, readers see no difference, and neither crashes nor concurrent
//! snapshots do harm.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn consolidate(history: &History, extent: Extent) -> Option<Consolidated> {
    match history.consolidate(extent, &quiet, &NEVER).unwrap() {
        Attempt::Done(done) => Some(done),
        Attempt::Nothing(_) | Attempt::Busy => None,
    }
}

fn packs(history: &History) -> Vec<PathBuf> {
    let all = fs::read_dir(history.repository().join("objects/pack")).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<_> = all.filter(|path| path.extension().is_some_and(|end| end == "pack")).collect();
    all.sort();
    all
}

#[track_caller]
fn all_is_good(history: &History) {
    for (number, report) in history.verify_all(&history.list().unwrap(), &|_| {}, &quiet, &NEVER) {
        assert_eq!(report.unwrap().bad, [], "checkpoint {number}");
    }
}

/// A tree in which some files change by one line in every round.
fn lay_out(sandbox: &Sandbox, files: u64) {
    for n in 0..files {
        let lines = (0..40 + n % 30).map(|line| format!("line {line} of file {n}: {}\n", line * 7919 % (n + 13)));
        sandbox.write(format!("d{}/e{}/f{n}", n % 7, n % 19), lines.collect::<String>());
    }
}

fn change(sandbox: &Sandbox, files: u64, round: u64, count: u64) {
    for n in 0..count {
        let n = (round * 31 + n * 17) % files;
        let path = sandbox.at(format!("d{}/e{}/f{n}", n % 7, n % 19));
        let mut text = fs::read_to_string(&path).unwrap();
        let at = (round as usize * 97) % text.len();
        text.insert_str(at, &format!("changed in round {round}\n"));
        fs::write(path, text).unwrap();
    }
}

fn with_rounds(rounds: u64) -> Sandbox {
    let sandbox = Sandbox::new();
    lay_out(&sandbox, 120);
    sandbox.checkpoint(1);
    for round in 2..=rounds {
        change(&sandbox, 120, round, 3);
        sandbox.checkpoint(round);
    }
    sandbox
}

#[test]
fn many_packs_become_one_and_every_checkpoint_stays_what_it_was() {
    let sandbox = with_rounds(60);
    let before: Vec<_> = (1..=60).map(|n| sandbox.history.listing_of(n).unwrap().items).collect();
    let fresh = sandbox.history.pack_stats().unwrap();
    assert_eq!((fresh.packs, fresh.fresh), (60, 60));
    assert_eq!(sandbox.history.worthwhile_extent(), Some(Extent::ManyFresh));
    let done = consolidate(&sandbox.history, Extent::ManyFresh).unwrap();
    assert_eq!(done.packs, 60);
    assert!(done.deltas > 500, "{done:?}");
    assert!(done.bytes_after * 5 < done.bytes_before * 2, "{done:?}");
    assert_eq!(packs(&sandbox.history).len(), 1);
    assert_eq!(sandbox.history.worthwhile_extent(), None);
    assert_eq!(consolidate(&sandbox.history, Extent::Fresh), None);

    for history in [&sandbox.history, &History::open(&sandbox.outside("state")).unwrap()] {
        all_is_good(history);
        let after: Vec<_> = (1..=60).map(|n| history.listing_of(n).unwrap().items).collect();
        assert_eq!(after, before);
        assert_eq!(history.pack_stats().unwrap().fresh, 0);
    }
    assert!(!sandbox.history.repository().join("pending/consolidation").exists());
    sandbox.restore_cleanly(7, 61);
    let text = fs::read_to_string(sandbox.at("d0/e0/f0")).unwrap();
    assert!(text.starts_with("line 0 of file 0"));
}

#[test]
fn git_reads_what_was_consolidated_and_finds_chains_short() {
    let sandbox = with_rounds(150);
    consolidate(&sandbox.history, Extent::Fresh).unwrap();
    let repository = sandbox.history.repository();
    git_in(repository, &["fsck", "--strict", "--full", "--no-dangling"]);
    for pack in packs(&sandbox.history) {
        let shown = git_in(repository, &["verify-pack", "-v", pack.to_str().unwrap()]);
        let shown = String::from_utf8(shown).unwrap();
        let depths =
            shown.lines().filter_map(|line| line.strip_prefix("chain length = ")?.split(':').next()?.parse().ok());
        let deepest: u32 = depths.max().unwrap();
        assert!((2..=crate::store::repack::MAX_DEPTH).contains(&deepest), "{deepest}");
    }
}

#[test]
fn a_consolidation_costs_what_is_new_not_what_is_there() {
    let sandbox = Sandbox::new();
    sandbox
        .write("large", (0..400_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect::<Vec<_>>());
    sandbox.write("small", "1");
    sandbox.checkpoint(1);
    sandbox.write("small", "2");
    sandbox.checkpoint(2);
    consolidate(&sandbox.history, Extent::Fresh).unwrap();
    let base = packs(&sandbox.history);
    for n in 3..10 {
        sandbox.write("small", format!("{n}"));
        sandbox.checkpoint(n);
    }
    assert_eq!(consolidate(&sandbox.history, Extent::ManyFresh), None);
    let done = consolidate(&sandbox.history, Extent::Fresh).unwrap();
    assert_eq!(done.packs, 7);
    assert!(packs(&sandbox.history).contains(&base[0]));
    assert_eq!(packs(&sandbox.history).len(), 2);
    all_is_good(&sandbox.history);
    assert_eq!(consolidate(&sandbox.history, Extent::Everything).unwrap().packs, 2);
    assert_eq!(packs(&sandbox.history).len(), 1);
    all_is_good(&sandbox.history);
    assert_eq!(consolidate(&sandbox.history, Extent::Everything), None);
}

#[test]
fn what_no_checkpoint_needs_any_more_is_dropped_even_where_others_were_deltas_to_it() {
    let sandbox = with_rounds(40);
    consolidate(&sandbox.history, Extent::Fresh).unwrap();
    let before = sandbox.history.pack_stats().unwrap().bytes;
    let listing = sandbox.history.listing_of(40).unwrap().items;
    (1..40).filter(|n| n % 9 != 0).for_each(|n| sandbox.history.remove(n).unwrap());
    assert_eq!(sandbox.history.worthwhile_extent(), Some(Extent::Waste));
    let done = consolidate(&sandbox.history, Extent::Waste).unwrap();
    assert_eq!(sandbox.history.worthwhile_extent(), None);
    assert_eq!(done.packs, 1);
    assert!(sandbox.history.pack_stats().unwrap().bytes < before);
    all_is_good(&sandbox.history);
    assert_eq!(sandbox.history.listing_of(40).unwrap().items, listing);
    git_in(sandbox.history.repository(), &["fsck", "--strict", "--full", "--no-dangling"]);

    sandbox.history.list().unwrap().into_iter().for_each(|n| sandbox.history.remove(n).unwrap());
    consolidate(&sandbox.history, Extent::Everything);
    // The workspace state stays, so that the next checkpoint costs only what has changed.
    assert_eq!(packs(&sandbox.history).len(), 1);
    assert_eq!(sandbox.take(41).stats.new_objects, 3);
}

#[test]
fn nothing_goes_while_a_snapshot_relies_on_it() {
    let sandbox = with_rounds(5);
    let under_way = sandbox.take(6);
    (1..=5).for_each(|n| sandbox.history.remove(n).unwrap());
    // Consolidation waits for the snapshot until it is cancelled.
    let stop = AtomicBool::new(false);
    let late = |progress: StoreProgress| stop.store(progress.phase == StorePhase::Verify, Ordering::Relaxed);
    let result = sandbox.history.consolidate(Extent::Everything, &late, &stop);
    assert!(matches!(result, Err(HistoryError::Cancelled)));
    sandbox.history.publish(&under_way).unwrap();
    all_is_good(&sandbox.history);
    consolidate(&sandbox.history, Extent::Everything).unwrap();
    all_is_good(&sandbox.history);
    assert_eq!(packs(&sandbox.history).len(), 1);
}

#[test]
fn what_is_published_while_packs_are_written_keeps_what_it_needs() {
    let sandbox = with_rounds(6);
    // Objects of checkpoint 7 alone are unneeded until checkpoint 9 finds them in a published pack.
    let old = fs::read(sandbox.at("d0/e0/f0")).unwrap();
    sandbox.write("d0/e0/f0", "only in checkpoint 7");
    sandbox.checkpoint(7);
    sandbox.write("d0/e0/f0", &old);
    sandbox.checkpoint(8);
    sandbox.history.remove(7).unwrap();
    let once = AtomicBool::new(false);
    let meddle = |progress: StoreProgress| {
        if progress.phase == StorePhase::Verify && !once.swap(true, Ordering::Relaxed) {
            sandbox.write("d0/e0/f0", "only in checkpoint 7");
            sandbox.checkpoint(9);
        }
    };
    let done = sandbox.history.consolidate(Extent::Everything, &meddle, &NEVER).unwrap();
    assert_eq!(done, Attempt::Busy);
    assert!(once.load(Ordering::Relaxed));
    all_is_good(&sandbox.history);
    assert!(!sandbox.history.repository().join("pending/consolidation").exists());
    assert!(consolidate(&sandbox.history, Extent::Everything).is_some());
    all_is_good(&sandbox.history);
}

#[test]
fn a_cancelled_consolidation_leaves_everything_as_it_was() {
    let sandbox = with_rounds(5);
    let before = contents(&sandbox.history);
    let result = sandbox.history.consolidate(Extent::Everything, &quiet, &AtomicBool::new(true));
    assert!(matches!(result, Err(HistoryError::Cancelled)));
    let stop = AtomicBool::new(false);
    let late = |progress: StoreProgress| stop.store(progress.phase == StorePhase::Verify, Ordering::Relaxed);
    let result = sandbox.history.consolidate(Extent::Everything, &late, &stop);
    assert!(matches!(result, Err(HistoryError::Cancelled)));
    assert_eq!(contents(&sandbox.history), before);
}

/// Everything in the repository, by name.
fn contents(history: &History) -> Vec<(String, Vec<u8>)> {
    files_on_disk(history.repository()).into_iter().map(|(name, (_, _, _, bytes))| (name, bytes)).collect()
}

#[test]
fn a_damaged_pack_is_neither_merged_nor_removed() {
    let sandbox = with_rounds(5);
    let all = packs(&sandbox.history);
    flip(&all[0], fs::metadata(&all[0]).unwrap().len() / 2, 0x10);
    let before = contents(&sandbox.history);
    let result = sandbox.history.consolidate(Extent::Everything, &quiet, &NEVER);
    // The position of the bit decides what is noticed first: a broken stream, or an id that does not match.
    let noticed = matches!(
        result,
        Err(HistoryError::DamagedObject { .. } | HistoryError::Io { action: "read an object of", .. })
    );
    assert!(noticed, "{result:?}");
    assert_eq!(contents(&sandbox.history), before);
    assert_eq!(packs(&sandbox.history), all);
}

fn flip(path: &Path, at: u64, mask: u8) {
    set_mode(path, 0o600);
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ mask], at).unwrap();
}

#[test]
fn a_flipped_bit_anywhere_in_a_pack_or_an_index_is_noticed() {
    let sandbox = Sandbox::new();
    for round in 1..=6 {
        sandbox.write("d/a", "some text\n".repeat(30) + &round.to_string());
        sandbox.write("b", [round as u8; 90]);
        sandbox.checkpoint(round);
    }
    consolidate(&sandbox.history, Extent::Fresh).unwrap();
    let pack = packs(&sandbox.history).remove(0);
    for path in [pack.clone(), pack.with_extension("idx")] {
        for at in 0..fs::metadata(&path).unwrap().len() {
            let mask = 1 << (at % 8);
            flip(&path, at, mask);
            for history in [&sandbox.history, &History::open(&sandbox.outside("state")).unwrap()] {
                history.objects.free_cache();
                let noticed = history.verify(3, &quiet, &NEVER).map(|report| !report.bad.is_empty());
                assert!(noticed.unwrap_or(true), "byte {at} of {}", path.display());
            }
            flip(&path, at, mask);
        }
    }
    all_is_good(&sandbox.history);
}

/// The body of the process that the next test kills; it does nothing unless started by that test.
#[test]
fn killed_consolidation_body() {
    if let Some(state) = std::env::var_os("FERMATA_TEST_CONSOLIDATION") {
        let history = History::open(Path::new(&state)).unwrap();
        history.consolidate(Extent::Everything, &quiet, &NEVER).unwrap();
    }
}

#[test]
fn a_consolidation_killed_at_any_instant_leaves_every_checkpoint_and_is_cleared_away() {
    let points = ["written", "before_removal", "swapped"].map(|name| format!("history.consolidation.{name}"));
    let moved = (1..=2).map(|n| format!("history.consolidation.moved@{n}"));
    let removed = (1..=8).map(|n| format!("history.consolidation.removed@{n}"));
    for point in points.into_iter().chain(moved).chain(removed) {
        let sandbox = with_rounds(4);
        let wanted: Vec<_> = (2..=4).map(|n| sandbox.history.listing_of(n).unwrap().items).collect();
        sandbox.history.remove(1).unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::packs::killed_consolidation_body"])
            .env("FERMATA_TEST_CONSOLIDATION", sandbox.outside("state"))
            .env("FERMATA_FAILPOINT", format!("{point}=abort"))
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9), "{point}");
        let history = History::open(&sandbox.outside("state")).unwrap();
        let listings = || -> Vec<_> { (2..=4).map(|n| history.listing_of(n).unwrap().items).collect() };
        assert_eq!(listings(), wanted, "{point}");
        all_is_good(&history);
        history.sweep().unwrap();
        assert_eq!(fs::read_dir(history.repository().join("pending")).unwrap().count(), 0, "{point}");
        all_is_good(&history);
        let left = packs(&history).len();
        assert!(left == 1 || left == 4, "{point}: {left} packs");
        consolidate(&history, Extent::Everything);
        all_is_good(&history);
        assert_eq!(listings(), wanted, "{point}");
        assert_eq!(fs::read_dir(history.repository().join("objects/pack")).unwrap().count(), 2, "{point}");
    }
}

#[test]
fn snapshots_removals_sweeps_and_consolidations_side_by_side_harm_no_checkpoint() {
    let sandbox = with_rounds(3);
    let history = &sandbox.history;
    let (stop, next) = (AtomicBool::new(false), AtomicU64::new(4));
    std::thread::scope(|scope| {
        let sandbox = &sandbox;
        let (stop, next) = (&stop, &next);
        scope.spawn(move || {
            for round in 0..60 {
                change(sandbox, 120, round, 4);
                if round % 7 == 0 {
                    sandbox.write("d0/e0/f0", "back and forth");
                }
                let number = next.load(Ordering::Relaxed);
                let snapshot = sandbox.take(number);
                if round % 5 == 4 {
                    history.discard(snapshot);
                } else {
                    history.publish(&snapshot).unwrap();
                }
                next.store(number + 1, Ordering::Relaxed);
            }
            stop.store(true, Ordering::Relaxed);
        });
        scope.spawn(move || {
            let mut done = 0;
            while !stop.load(Ordering::Relaxed) {
                let extent = if done % 3 == 0 { Extent::Everything } else { Extent::Fresh };
                done += u64::from(consolidate(history, extent).is_some());
            }
            assert!(done > 0, "no consolidation came through");
        });
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let all = history.list().unwrap();
                if all.len() > 8 {
                    history.remove(all[all.len() / 2]).unwrap();
                    history.sweep().unwrap();
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let all = history.list().unwrap();
                let newest = all[all.len() - 1];
                assert_eq!(history.verify(newest, &quiet, &NEVER).unwrap().bad, [], "checkpoint {newest}");
            }
        });
    });
    all_is_good(history);
    consolidate(history, Extent::Everything);
    all_is_good(history);
}

proptest! {
    #![proptest_config(fermata_test_seeds::cases(12))]

    #[test]
    fn whatever_is_checkpointed_removed_and_consolidated_every_checkpoint_verifies(
        acts in proptest::collection::vec((0_u8..10, 0_usize..12, 0_usize..400), 10..60),
    ) {
        let sandbox = Sandbox::new();
        let mut next = 1;
        let mut wanted = BTreeMap::new();
        for (act, file, size) in acts {
            match act {
                0 => drop(consolidate(&sandbox.history, Extent::Fresh)),
                1 => drop(consolidate(&sandbox.history, Extent::Everything)),
                2 if wanted.len() > 2 => {
                    let number = *wanted.keys().nth(file % wanted.len()).unwrap();
                    sandbox.history.remove(number).unwrap();
                    wanted.remove(&number);
                }
                3 => drop(sandbox.history.sweep().unwrap()),
                _ => {
                    let text: String = (0..size).map(|n| format!("{} ", n * file)).collect();
                    sandbox.write(format!("d{}/f{file}", file % 3), text);
                    sandbox.checkpoint(next);
                    wanted.insert(next, sandbox.history.listing_of(next).unwrap().items);
                    next += 1;
                }
            }
        }
        all_is_good(&sandbox.history);
        for (number, items) in wanted {
            prop_assert_eq!(sandbox.history.listing_of(number).unwrap().items, items);
        }
    }
}

/// Returns the bytes of all files below a directory.
fn bytes_below(dir: &Path) -> u64 {
    walk(dir)
        .iter()
        .filter_map(|path| fs::symlink_metadata(path).ok())
        .filter(|meta| meta.is_file())
        .map(|meta| meta.len())
        .sum()
}

/// Prints the cost of many checkpoints beside the same commits in git after `git gc`. `FERMATA_BENCH_TREE` sets
/// the tree (which is copied), `FERMATA_BENCH_COUNT` the number of checkpoints.
#[test]
#[ignore = "takes minutes: cargo test --release -p fermata-history disk_for_a_thousand -- --ignored --nocapture"]
fn disk_for_a_thousand_checkpoints_is_at_most_one_and_a_half_of_git_after_gc() {
    let sandbox = Sandbox::new();
    let count: u64 = std::env::var("FERMATA_BENCH_COUNT").ok().and_then(|n| n.parse().ok()).unwrap_or(1000);
    match std::env::var_os("FERMATA_BENCH_TREE") {
        Some(tree) => {
            let status = Command::new("cp").arg("-a").arg(PathBuf::from(tree).join(".")).arg(sandbox.path()).status();
            assert!(status.unwrap().success());
        }
        None => lay_out(&sandbox, 4000),
    }
    let files: Vec<PathBuf> = walk(&sandbox.path())
        .into_iter()
        .filter(|path| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() > 0))
        .collect();
    sandbox.git(&["init", "-q"]);
    let mut longest = Duration::ZERO;
    for round in 1..=count {
        for n in 0..10_usize {
            let path = &files[(round as usize * 7919 + n * 104_729) % files.len()];
            let mut text = fs::read(path).unwrap();
            let at = (round as usize * 97) % text.len();
            text.splice(at..at, format!("/* round {round} */\n").into_bytes());
            fs::write(path, text).unwrap();
        }
        sandbox.checkpoint(round);
        sandbox.git(&["add", "-A"]);
        sandbox.git(&["commit", "-qm", &format!("checkpoint {round}")]);
        // As the daemon does it.
        if let Some(extent) = sandbox.history.worthwhile_extent() {
            let start = std::time::Instant::now();
            consolidate(&sandbox.history, extent);
            longest = longest.max(start.elapsed());
        }
    }
    let as_it_goes = sandbox.history.pack_stats().unwrap();
    let start = std::time::Instant::now();
    consolidate(&sandbox.history, Extent::Everything);
    let took = start.elapsed();
    let ours = sandbox.history.pack_stats().unwrap();
    sandbox.git(&["gc", "-q"]);
    let git = bytes_below(&sandbox.at(".git/objects"));
    let ratio = |bytes: u64| bytes as f64 / git as f64;
    println!("{count} checkpoints of 10 changed files in {} files", files.len());
    println!("git after gc        {git:>12} bytes");
    println!(
        "kept by the daemon  {:>12} bytes in {} packs: {:.2} times git",
        as_it_goes.bytes,
        as_it_goes.packs,
        ratio(as_it_goes.bytes)
    );
    println!(
        "consolidated fully  {:>12} bytes in {} packs: {:.2} times git",
        ours.bytes,
        ours.packs,
        ratio(ours.bytes)
    );
    println!("longest consolidation under way {longest:?}, of everything {took:?}");
    let start = std::time::Instant::now();
    all_is_good(&sandbox.history);
    println!("all verified in {:?}", start.elapsed());
    assert!(ratio(ours.bytes) <= 1.5, "{:.2}", ratio(ours.bytes));
}

#[test]
fn whoever_waits_for_room_gets_back_what_little_a_large_pack_wastes() {
    let sandbox = with_rounds(12);
    let history = &sandbox.history;
    let noise = (0..10_000_u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23) ^ (n * n * n)) as u8);
    sandbox.write("noise", noise.collect::<Vec<_>>());
    sandbox.checkpoint(13);
    fs::remove_file(sandbox.at("noise")).unwrap();
    sandbox.checkpoint(14);
    consolidate(history, Extent::Everything).unwrap();
    history.remove(13).unwrap();
    let Attempt::Nothing(Some(wasted)) = history.consolidate(Extent::Waste, &quiet, &NEVER).unwrap() else {
        panic!("so little is not worth it");
    };
    assert!(wasted > 0);
    let done = consolidate(history, Extent::FreeSpace).unwrap();
    assert!(done.bytes_after < done.bytes_before && done.wasted == 0, "{done:?}");
    assert_eq!(history.consolidate(Extent::FreeSpace, &quiet, &NEVER).unwrap(), Attempt::Nothing(Some(0)));
    all_is_good(history);
}

#[test]
fn removals_are_looked_for_until_a_consolidation_has_dealt_with_them() {
    let sandbox = with_rounds(12);
    let history = &sandbox.history;
    consolidate(history, Extent::Everything).unwrap();
    (1..=8).for_each(|number| history.remove(number).unwrap());
    assert_eq!(history.worthwhile_extent(), Some(Extent::Waste));
    let before = contents(history);
    let result = history.consolidate(Extent::Everything, &quiet, &AtomicBool::new(true));
    assert!(matches!(result, Err(HistoryError::Cancelled)), "{result:?}");
    assert_eq!(contents(history), before);
    assert_eq!(history.worthwhile_extent(), Some(Extent::Waste), "it was cancelled");
    let other = history.consolidating.lock().unwrap();
    assert_eq!(history.consolidate(Extent::Waste, &quiet, &NEVER).unwrap(), Attempt::Busy);
    drop(other);
    assert_eq!(history.worthwhile_extent(), Some(Extent::Waste), "somebody else was at work");
    assert_ne!(history.consolidate(Extent::Waste, &quiet, &NEVER).unwrap(), Attempt::Busy);
    assert_eq!(history.worthwhile_extent(), None);
}

fn known_packs(history: &History) -> Vec<String> {
    let mut known: Vec<_> = history.objects.indexes().iter().map(|index| index.name.clone()).collect();
    known.sort();
    known
}

fn packs_with_index(history: &History) -> Vec<String> {
    let all = fs::read_dir(history.objects.pack_dir()).unwrap().map(|entry| entry.unwrap().file_name());
    let names = all.filter_map(|name| Some(name.to_str()?.strip_suffix(".idx")?.to_owned()));
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[test]
fn a_swap_that_fails_half_way_is_noticed_by_the_next_snapshot() {
    let sandbox = with_rounds(5);
    let history = &sandbox.history;
    let old = known_packs(history);
    let stubborn = |progress: StoreProgress| {
        if progress.phase == StorePhase::Verify {
            // A directory blocks the name to which an old pack is moved.
            old.iter().for_each(|name| {
                fs::create_dir_all(history.pending().join(format!("consolidation/{name}.gone/x"))).unwrap();
            });
        }
    };
    let result = history.consolidate(Extent::Everything, &stubborn, &NEVER);
    let Err(HistoryError::Io { action: "move", path, source }) = result else { panic!("{result:?}") };
    assert_eq!(source.kind(), std::io::ErrorKind::IsADirectory);
    let stuck = path.file_stem().and_then(|name| name.to_str()).unwrap().to_owned();
    assert!(path.exists() && old.contains(&stuck), "{} stays where it was", path.display());
    let new: Vec<_> = known_packs(history).into_iter().filter(|name| !old.contains(name)).collect();
    assert_eq!(new.len(), 1, "{new:?}");
    let left = old.iter().filter(|name| **name != stuck).chain(&new).cloned();
    assert_eq!(known_packs(history).into_iter().collect::<BTreeSet<_>>(), left.collect());
    assert_eq!(known_packs(history), packs_with_index(history));
    all_is_good(history);
    sandbox.checkpoint(6);
    consolidate(history, Extent::Everything);
    all_is_good(history);
}

#[test]
fn a_new_snapshot_notices_a_removed_index() {
    let sandbox = with_rounds(2);
    let history = &sandbox.history;
    // The clock of the file system must tick in between.
    std::thread::sleep(Duration::from_millis(20));
    let gone = packs(history).remove(0).with_extension("idx");
    fs::rename(&gone, sandbox.outside("index")).unwrap();
    assert_eq!(known_packs(history).len(), 2);
    drop(history.start_pending(9).unwrap());
    assert_eq!(known_packs(history), packs_with_index(history));
}
