//! Random trees and random changes: a restore brings the original back, completely or in part, even if it is
//! interrupted and rolled forward.

use std::os::unix::fs::{FileExt, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use proptest::prelude::*;

use super::*;
use crate::tree::confined_dir::Time;

#[derive(Clone, Debug)]
enum Act {
    Write(String, Vec<u8>),
    /// Writes into an existing file, which changes all of its names.
    WriteThrough(String, Vec<u8>),
    Sparse(String, u32),
    Link(String, String),
    /// Adds another name for the file at the first path.
    HardLink(String, String),
    Directory(String),
    Remove(String),
    Rename(String, String),
    Mode(String, u32),
    Time(String, u64),
    Attribute(String, bool, Vec<u8>),
}

/// Few names, so that files, links and directories often have the same path.
fn path() -> impl Strategy<Value = String> {
    let odd = prop_oneof!["[abc]", Just("a.b".to_owned()), Just("ä %\n".to_owned()), Just("git~1".to_owned())];
    proptest::collection::vec(odd, 1..4).prop_map(|names| names.join("/"))
}

fn text() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..60)
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (path(), text()).prop_map(|(path, text)| Act::Write(path, text)),
        1 => (path(), text()).prop_map(|(path, text)| Act::WriteThrough(path, text)),
        1 => (path(), any::<u32>()).prop_map(|(path, at)| Act::Sparse(path, at % 1_000_000)),
        1 => (path(), path()).prop_map(|(path, target)| Act::Link(path, target)),
        3 => (path(), path()).prop_map(|(from, path)| Act::HardLink(from, path)),
        1 => path().prop_map(Act::Directory),
        2 => path().prop_map(Act::Remove),
        1 => (path(), path()).prop_map(|(from, to)| Act::Rename(from, to)),
        2 => (path(), 0u32..0o10000).prop_map(|(path, mode)| Act::Mode(path, mode)),
        1 => (path(), 0u64..2_000_000_000_000_000_000).prop_map(|(path, ns)| Act::Time(path, ns)),
        2 => (path(), any::<bool>(), text()).prop_map(|(path, first, value)| Act::Attribute(path, first, value)),
    ]
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    proptest::collection::vec(act(), 0..40)
}

fn clear(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

/// Creates the directories above a path and replaces other entries that are in the way.
fn make_room(root: &Path, path: &str) -> PathBuf {
    let mut at = root.to_owned();
    let names: Vec<&str> = path.split('/').collect();
    for name in &names[..names.len() - 1] {
        at.push(name);
        if !fs::symlink_metadata(&at).is_ok_and(|meta| meta.is_dir()) {
            clear(&at);
            fs::create_dir(&at).unwrap();
        }
    }
    at.join(names[names.len() - 1])
}

fn is_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file())
}

fn is_no_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| !meta.is_symlink())
}

fn perform(root: &Path, act: &Act) {
    match act {
        Act::Write(path, text) => {
            let path = make_room(root, path);
            clear(&path);
            fs::write(path, text).unwrap();
        }
        Act::WriteThrough(path, text) => {
            let path = make_room(root, path);
            if is_file(&path) {
                fs::write(path, text).unwrap();
            }
        }
        Act::Sparse(path, at) => {
            let path = make_room(root, path);
            clear(&path);
            let file = fs::File::create(path).unwrap();
            file.write_all_at(b"after a hole", u64::from(*at)).unwrap();
            // Delayed allocation would hide the hole until the file is flushed.
            file.sync_all().unwrap();
        }
        Act::Link(path, target) => {
            let path = make_room(root, path);
            clear(&path);
            symlink(target, path).unwrap();
        }
        Act::HardLink(from, path) => {
            let from = root.join(from);
            if is_file(&from) {
                let path = make_room(root, path);
                // Creating the parent directories may have removed the file.
                if is_file(&from) && !from.starts_with(&path) {
                    clear(&path);
                    // The source may have been reached through a link.
                    if is_file(&from) {
                        fs::hard_link(from, path).unwrap();
                    }
                }
            }
        }
        Act::Directory(path) => {
            let path = make_room(root, path);
            clear(&path);
            fs::create_dir(path).unwrap();
        }
        Act::Remove(path) => clear(&make_room(root, path)),
        Act::Rename(from, to) => {
            let from = make_room(root, from);
            let to = make_room(root, to);
            if fs::symlink_metadata(&from).is_ok() && !to.starts_with(&from) && !from.starts_with(&to) {
                clear(&to);
                fs::rename(from, to).unwrap();
            }
        }
        Act::Mode(path, mode) => {
            let path = make_room(root, path);
            if is_no_link(&path) {
                // Without privileges a closed file is skipped and a closed directory cannot be entered.
                let open = if nix::unistd::geteuid().is_root() { 0 } else { 0o700 };
                set_mode(&path, mode | open);
            }
        }
        Act::Time(path, ns) => {
            let path = make_room(root, path);
            if is_no_link(&path) {
                set_mtime(&path, *ns);
            }
        }
        Act::Attribute(path, first, value) => {
            let path = make_room(root, path);
            if is_no_link(&path) {
                set_xattr(&path, if *first { "user.first" } else { "user.ä second" }, Some(value));
            }
        }
    }
}

/// Everything that a restore must bring back, except holes, which depend on the file system.
fn all_of(sandbox: &Sandbox) -> (FilesOnDisk, Finer) {
    let mut finer = finer(&sandbox.path());
    finer.values_mut().for_each(|one| one.2 = false);
    (files_on_disk(&sandbox.path()), finer)
}

/// Applies the first steps of a plan, like a daemon that dies, and then applies the plan again.
fn apply_with_a_crash(sandbox: &Sandbox, plan: &RestorePlan, after: u64) -> RestoreReport {
    let die = |progress: StoreProgress| {
        if progress.phase == StorePhase::Apply && progress.done == after {
            resume_unwind(Box::new("dies here"));
        }
    };
    let died = catch_unwind(AssertUnwindSafe(|| sandbox.history.apply_restore(plan, &die)));
    assert_eq!(died.is_err(), after <= plan.operations.len() as u64);
    sandbox.history.apply_restore(plan, &quiet).unwrap()
}

proptest! {
    #![proptest_config(fermata_test_seeds::cases(120))]

    #[test]
    fn a_restore_brings_back_any_earlier_state(first in acts(), then in acts(), crash in 1u64..40) {
        let sandbox = Sandbox::new();
        first.iter().for_each(|act| perform(&sandbox.path(), act));
        sandbox.checkpoint(1);
        let original = all_of(&sandbox);
        then.iter().for_each(|act| perform(&sandbox.path(), act));
        let changed = all_of(&sandbox);

        sandbox.checkpoint(2);
        let plan = sandbox.plan(1, 2, None);
        prop_assert_eq!(&sandbox.planned(1, None, None).plan.operations, &plan.operations);
        prop_assert_eq!(&plan.conflicts, &[]);
        let report = apply_with_a_crash(&sandbox, &plan, crash);
        prop_assert_eq!(&report.mismatches, &[]);
        prop_assert_eq!(all_of(&sandbox), original);
        let here = Point::Workspace(sandbox.path(), sandbox.rules.clone());
        let diff = sandbox.history.diff(&Point::Checkpoint(1), &here, &quiet, &NEVER).unwrap();
        prop_assert_eq!(diff, Diff::default());
        let ended = Time { sec: i64::MAX, nsec: 0 };
        let check = sandbox.history.check_restored(&plan, &report, &sandbox.rules, ended, &quiet, &NEVER).unwrap();
        prop_assert_eq!(check.mismatches, vec![]);

        sandbox.restore_cleanly(2, 3);
        prop_assert_eq!(all_of(&sandbox), changed);
        let listings = |number| sandbox.history.listing_of(number).unwrap();
        let whole = diff::compare(&listings(1), &listings(2));
        prop_assert_eq!(sandbox.history.diff(&Point::Checkpoint(1), &Point::Checkpoint(2), &quiet, &NEVER).unwrap(), whole);
        for number in 1..=3 {
            prop_assert_eq!(sandbox.history.verify(number, &quiet, &NEVER).unwrap().bad, vec![]);
        }
    }

    #[test]
    fn a_restore_of_some_paths_changes_nothing_else(
        first in acts(),
        then in acts(),
        chosen in proptest::collection::vec(path(), 1..3),
        crash in 1u64..20,
    ) {
        let sandbox = Sandbox::new();
        first.iter().for_each(|act| perform(&sandbox.path(), act));
        sandbox.checkpoint(1);
        let (original, original_finer) = all_of(&sandbox);
        then.iter().for_each(|act| perform(&sandbox.path(), act));
        let (changed, changed_finer) = all_of(&sandbox);
        sandbox.checkpoint(2);
        let chosen: Vec<RelPath> = chosen.iter().map(|path| rel(path)).collect();
        let plan = sandbox.plan(1, 2, Some(&chosen));
        prop_assert_eq!(&sandbox.planned(1, None, Some(&chosen)).plan.operations, &plan.operations);
        let report = apply_with_a_crash(&sandbox, &plan, crash);
        prop_assert_eq!(&report.mismatches, &[]);
        let (now, now_finer) = all_of(&sandbox);

        let within = |name: &str, paths: &[RelPath]| {
            let shown = |path: &RelPath| path.bytes().escape_ascii().to_string();
            paths.iter().map(shown).any(|path| name == path || name.starts_with(&format!("{path}/")))
        };
        let blocked: Vec<RelPath> = plan.conflicts.iter().map(|one| one.path.clone()).collect();
        let is_chosen = |name: &str| within(name, &chosen);
        let names: std::collections::BTreeSet<&String> =
            original.keys().chain(changed.keys()).chain(now.keys()).collect();
        for name in names {
            if within(name, &blocked) {
                continue;
            }
            let is_dir = |files: &FilesOnDisk| files.get(name).is_some_and(|one| one.0 & 0o170_000 == 0o040_000);
            let attributes = |finer: &Finer| finer.get(name).map(|one| one.0.clone());
            if is_chosen(name) {
                prop_assert_eq!(now.get(name), original.get(name), "{}", name);
                prop_assert_eq!(attributes(&now_finer), attributes(&original_finer), "{}", name);
            } else if !is_dir(&now) {
                // Missing directories above restored paths are created, and their times change.
                prop_assert_eq!(now.get(name), changed.get(name), "{}", name);
                prop_assert_eq!(attributes(&now_finer), attributes(&changed_finer), "{}", name);
            }
            // Two names share a file only if they did so before or at the checkpoint.
            let linked = |finer: &Finer| finer.get(name).map(|one| one.1.clone()).unwrap_or_default();
            for other in linked(&now_finer) {
                let known = linked(&original_finer).contains(&other) || linked(&changed_finer).contains(&other);
                prop_assert!(known, "{} and {} are linked", name, other);
            }
        }
    }
}
