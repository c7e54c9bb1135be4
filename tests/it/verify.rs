//! `checkpoint verify` and `checkpoint show`: every part is read again, and missing parts are reported.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use fermata_protocol::Code;
use fermata_protocol::checkpoint::{CheckpointShow, CheckpointVerify};
use fermata_tests::{Sandbox, Workspace};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::scene::*;

fn with_checkpoints(sandbox: &Sandbox, count: u64) -> Workspace {
    let workspace = furnished(sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    for number in 1..=count {
        workspace.write(&format!("file-{number}.txt"), format!("{number}\n"));
        assert_eq!(checkpoint(sandbox).id, number);
    }
    workspace
}

/// Changes one byte in the middle of a file.
fn spoil(path: &Path) {
    let file = fs::File::options().read(true).write(true).open(path).expect("open what is spoilt");
    let middle = file.metadata().expect("its size").len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).expect("read a byte");
    file.write_all_at(&[byte[0] ^ 0x55], middle).expect("change a byte");
}

/// Verifies one checkpoint and returns its problems.
fn problems(sandbox: &Sandbox, checkpoint: u64) -> Vec<String> {
    let verify = CheckpointVerify { project: web(), checkpoint: Some(checkpoint) };
    let mut found = done(sandbox, &verify).checkpoints;
    assert_eq!(found.len(), 1);
    let one = found.remove(0);
    assert_eq!(one.good, one.problems.is_empty());
    one.problems
}

#[test]
fn each_checkpoint_has_a_line_and_a_damaged_one_costs_the_exit_code() {
    let sandbox = Sandbox::start();
    with_checkpoints(&sandbox, 3);
    let output = sandbox.ctl_output(&["checkpoint", "verify", "web", "--all"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text.lines().filter(|line| line.ends_with("ok")).count(), 3, "{text}");

    spoil(&project_dir(&sandbox).join("checkpoints/2/context.json"));
    let output = sandbox.ctl_output(&["checkpoint", "verify", "web"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text.lines().filter(|line| line.ends_with("ok")).count(), 2, "{text}");
    let damaged = text.lines().find(|line| line.contains("damaged")).expect("one is damaged");
    assert!(damaged.trim_start().starts_with('2') && damaged.contains("context.json has changed"), "{damaged}");
    assert_eq!(sandbox.ctl_output(&["checkpoint", "verify", "web", "1"]).status.code(), Some(0));
    assert_eq!(sandbox.ctl_output(&["checkpoint", "verify", "web", "2"]).status.code(), Some(1));
    assert_eq!(sandbox.ctl_output(&["checkpoint", "verify", "web", "9"]).status.code(), Some(3));
}

#[test]
fn a_changed_byte_in_any_part_is_noticed() {
    let sandbox = Sandbox::start();
    with_checkpoints(&sandbox, 4);
    let dir = |number: u64| project_dir(&sandbox).join("checkpoints").join(number.to_string());
    spoil(&dir(1).join("database.sqlite"));
    spoil(&dir(2).join("manifest.json"));
    fs::remove_file(dir(3).join("context.json")).expect("remove a part");
    for (number, what) in [(1, "database"), (2, "manifest"), (3, "context")] {
        let problems = problems(&sandbox, number);
        assert!(problems.iter().any(|problem| problem.starts_with(what)), "{number}: {problems:?}");
    }
    assert_eq!(problems(&sandbox, 4), Vec::<String>::new());

    // The newest pack has the new objects of checkpoint 4, which no other checkpoint needs.
    let packs = project_dir(&sandbox).join("history/history.git/objects/pack");
    let newest = fs::read_dir(&packs)
        .expect("list packs")
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "pack"))
        .max_by_key(|entry| entry.metadata().and_then(|meta| meta.modified()).expect("its time"));
    let newest = newest.expect("there is one").path();
    let mut mode = fs::metadata(&newest).expect("its mode").permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o600);
    fs::set_permissions(&newest, mode).expect("make it writable");
    spoil(&newest);
    let problems = problems(&sandbox, 4);
    assert!(problems.iter().any(|problem| problem.starts_with("workspace")), "{problems:?}");
}

#[test]
fn what_is_left_out_is_shown_with_its_reason_and_counted_where_it_is_much() {
    let sandbox = Sandbox::start();
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text(), "--max-file-size", "1KiB"]);
    workspace.write("large.bin", vec![7_u8; 4096]);
    mkfifo(&workspace.path().join("a.fifo"), Mode::S_IRWXU).expect("make a FIFO");
    checkpoint(&sandbox);
    let shown = sandbox.ctl(&["checkpoint", "show", "web", "1"]);
    let line = |name: &str| shown.lines().find(|line| line.contains(name)).unwrap_or_default().to_owned();
    assert!(line("large.bin").contains("too large (4096 bytes)"), "{shown}");
    assert!(line("a.fifo").contains("special (fifo)"), "{shown}");

    for number in 0..600 {
        workspace.write(&format!("many/{number}.bin"), vec![7_u8; 1025]);
    }
    checkpoint(&sandbox);
    let detail = done(&sandbox, &CheckpointShow { project: web(), checkpoint: 2 });
    assert_eq!((detail.skipped.len(), detail.skipped_total, detail.torn_total), (500, 602, 0));
    assert!(sandbox.ctl(&["checkpoint", "show", "web", "2"]).contains("… and 102 more"));
    assert_eq!(refused(&sandbox, &CheckpointShow { project: web(), checkpoint: 3 }).code, Code::CheckpointNotFound);
}
