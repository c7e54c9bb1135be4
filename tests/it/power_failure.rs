//! A power failure in the middle of a checkpoint, which loses all unflushed data: every checkpoint that is listed
//! after the next start is complete.

use fermata_protocol::checkpoint::{CheckpointCreate, CheckpointRestore};
use fermata_protocol::transfer::CheckpointConsolidate;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, process};

use crate::scene::*;

const FAILPOINT: &str = "FERMATA_FAILPOINT";

fn creation() -> CheckpointCreate {
    CheckpointCreate { project: Some(web()), name: None, description: String::new() }
}

/// A failpoint at which the power fails, and the number of checkpoints that were reported as made; one more may exist.
fn fails_at(failpoint: &str, consolidate: bool) {
    let mut sandbox = Sandbox::builder()
        .machine()
        .disk_of_its_own()
        .config("[pause]\ndisk_floor_bytes = 0\n")
        .env(FAILPOINT, &format!("{failpoint}=stop"))
        .start();
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    let mut contents = Vec::new();
    for round in 1..=2 {
        workspace.write("README.md", format!("# Round {round}\n"));
        contents.push(format!("# Round {round}\n"));
        assert_eq!(checkpoint(&sandbox).id, round);
    }
    workspace.write("README.md", "# Round 3\n");
    contents.push("# Round 3\n".to_owned());
    let mut client = sandbox.rpc();
    std::thread::scope(|scope| {
        let asked = scope.spawn(move || match consolidate {
            true => client.call(&CheckpointConsolidate { project: web(), everything: true }).is_err(),
            false => client.call(&creation()).is_err(),
        });
        let stands_still = || {
            let all = sandbox.daemon_group().expect("it is in a group");
            all.into_iter()
                .any(|pid| process::command_line(pid).ends_with("fermatad") && process::state(pid) == Some('T'))
        };
        wait_until(SOON, &format!("the daemon to stand still at {failpoint}"), stands_still);
        sandbox.lose_power();
        assert!(asked.join().expect("an end"), "the call was answered before the power failure");
    });
    sandbox.forget_env(FAILPOINT);
    sandbox.start_daemon();
    settled(&sandbox);
    let numbers = checkpoints(&sandbox);
    assert!(numbers == [1, 2] || (!consolidate && numbers == [1, 2, 3]), "{failpoint}: {numbers:?}");
    only_these_are_left(&sandbox, &numbers);
    all_verify(&sandbox);
    for number in numbers {
        let restore = CheckpointRestore { project: web(), checkpoint: number, dry_run: false, paths: Vec::new() };
        done(&sandbox, &restore);
        assert_eq!(Some(&workspace.read("README.md")), contents.get(number as usize - 1), "{failpoint}");
    }
    checkpoint(&sandbox);
    all_verify(&sandbox);
}

macro_rules! power_fails {
    ($($name:ident: $point:literal, $consolidate:literal;)*) => {
        $(mod $name {
            #[test]
            fn a_machine_that_loses_its_power_here_keeps_every_listed_checkpoint() {
                super::fails_at($point, $consolidate);
            }
        })*
    };
}

power_fails! {
    at_captured: "checkpoint.captured@3", false;
    at_pack_written: "history.pack.written@3", false;
    at_index_moved: "history.pack.moved@6", false;
    at_ref_linked: "history.ref.linked@3", false;
    at_renamed: "checkpoint.renamed@3", false;
    at_ref_created: "history.ref.created@3", false;
    at_sealed: "checkpoint.sealed@3", false;
    at_committed: "checkpoint.committed@3", false;
    at_consolidation_moved: "history.consolidation.moved@2", true;
    at_consolidation_removed: "history.consolidation.removed@2", true;
    at_consolidation_swapped: "history.consolidation.swapped", true;
}

#[test]
fn every_operation_that_was_reported_as_done_survives_a_power_failure() {
    let mut sandbox = Sandbox::builder().machine().disk_of_its_own().config("[pause]\ndisk_floor_bytes = 0\n").start();
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    for round in 1..=6 {
        workspace.write("README.md", format!("# Round {round}\n")).write(&format!("{round}/new.txt"), "new\n");
        assert_eq!(checkpoint(&sandbox).id, round);
        sandbox.lose_power();
        sandbox.start_daemon();
        settled(&sandbox);
        only_these_are_left(&sandbox, &(1..=round).collect::<Vec<_>>());
        all_verify(&sandbox);
    }
}
