//! Random trees and random changes: a restore always brings the original back.

use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Act {
    Write(String, Vec<u8>),
    Link(String, String),
    Directory(String),
    Remove(String),
    Mode(String, u32),
}

/// Few names, so that files, links and directories often meet at the same path.
fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof!["[abc]", Just("a.b".to_owned()), Just("ä %".to_owned())], 1..4)
        .prop_map(|names| names.join("/"))
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (path(), proptest::collection::vec(any::<u8>(), 0..60)).prop_map(|(path, text)| Act::Write(path, text)),
        1 => (path(), path()).prop_map(|(path, target)| Act::Link(path, target)),
        1 => path().prop_map(Act::Directory),
        2 => path().prop_map(Act::Remove),
        1 => (path(), 0o400u32..0o1000).prop_map(|(path, mode)| Act::Mode(path, mode | 0o700)),
    ]
}

fn clear(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

/// Makes the directories above a path, in place of whatever stands there.
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

fn perform(root: &Path, act: &Act) {
    match act {
        Act::Write(path, text) => {
            let path = make_room(root, path);
            clear(&path);
            fs::write(path, text).unwrap();
        }
        Act::Link(path, target) => {
            let path = make_room(root, path);
            clear(&path);
            symlink(target, path).unwrap();
        }
        Act::Directory(path) => {
            let path = make_room(root, path);
            clear(&path);
            fs::create_dir(path).unwrap();
        }
        Act::Remove(path) => clear(&make_room(root, path)),
        Act::Mode(path, mode) => {
            let path = make_room(root, path);
            if fs::symlink_metadata(&path).is_ok_and(|meta| !meta.is_symlink()) {
                set_mode(&path, *mode);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_restore_brings_back_any_earlier_state(
        first in proptest::collection::vec(act(), 0..30),
        then in proptest::collection::vec(act(), 0..30),
    ) {
        let sandbox = Sandbox::new();
        first.iter().for_each(|act| perform(&sandbox.path(), act));
        sandbox.checkpoint(1);
        let original = picture(&sandbox.path());
        then.iter().for_each(|act| perform(&sandbox.path(), act));
        let changed = picture(&sandbox.path());

        sandbox.restore_cleanly(1, 2);
        prop_assert_eq!(picture(&sandbox.path()), original);
        let here = Point::Workspace(sandbox.path(), sandbox.rules.clone());
        let diff = sandbox.history.diff(&Point::Checkpoint(1), &here, &quiet, &NEVER).unwrap();
        prop_assert_eq!(diff, Diff::default());
        sandbox.restore_cleanly(2, 3);
        prop_assert_eq!(picture(&sandbox.path()), changed);
        for number in 1..=3 {
            prop_assert_eq!(sandbox.history.verify(number, &quiet, &NEVER).unwrap().bad, vec![]);
        }
    }
}
