//! `checkpoint export`, `import` and `consolidate`: an import equals the exported checkpoint, or leaves nothing.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use fermata_protocol::Code;
use fermata_protocol::checkpoint::{CheckpointRestore, CheckpointShow};
use fermata_protocol::terminal::Bytes;
use fermata_protocol::transfer::{CheckpointConsolidate, CheckpointDownload, CheckpointImport, CheckpointUpload};
use fermata_tests::Sandbox;
use fermata_tests::Workspace;

use crate::scene::*;

const FAILPOINT: &str = "FERMATA_FAILPOINT";
const FILE: &str = "web.checkpoint";

/// Creates a project with a checkpoint that has every kind of part, and exports it.
fn exported(sandbox: &Sandbox) -> (Workspace, PathBuf) {
    let workspace = furnished(sandbox, "web");
    symlink("nowhere", workspace.path().join("link")).expect("make a link");
    fs::create_dir(workspace.path().join("empty")).expect("make a directory");
    workspace.write("run.sh", "#!/bin/sh\n").write("many.bin", vec![9_u8; 3 << 20]);
    fs::set_permissions(workspace.path().join("run.sh"), fs::Permissions::from_mode(0o750)).expect("set the mode");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    checkpoint(sandbox);
    workspace.write("README.md", "# As exported\n");
    sandbox.ctl(&["checkpoint", "create", "web", "--name", "the good one"]);
    workspace.write("README.md", "# Later\n");
    let file = sandbox.path().join(FILE);
    let shown = sandbox.ctl_json(&["checkpoint", "export", "web", "2", path(&file), "--json"]);
    assert_eq!(shown["bytes"].as_u64(), fs::metadata(&file).ok().map(|meta| meta.len()));
    assert_eq!(fs::metadata(&file).expect("the file").permissions().mode() & 0o777, 0o600);
    (workspace, file)
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a temporary path is ASCII")
}

/// Uploads bytes as a client does, and imports them as a checkpoint.
fn import(sandbox: &Sandbox, bytes: &[u8]) -> Result<u64, fermata_protocol::Refusal> {
    use sha2::Digest as _;
    let mut client = sandbox.rpc();
    let mut offset = 0;
    for piece in bytes.chunks(300_000) {
        let sent = client.call(&CheckpointUpload { offset, data: Bytes(piece.to_vec()) }).expect("send a piece");
        offset = sent.bytes;
    }
    let sha256 = sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    refusal(client.call(&CheckpointImport { project: web(), sha256 })).map(|made| made.checkpoint_id)
}

/// A second machine with an empty project of the same name.
fn elsewhere() -> (Sandbox, Workspace) {
    let sandbox = Sandbox::start();
    let workspace = sandbox.workspace("elsewhere");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    (sandbox, workspace)
}

#[test]
fn a_checkpoint_is_restored_on_another_machine() {
    let here = Sandbox::start();
    let (workspace, file) = exported(&here);
    workspace.write("README.md", "# As exported\n");
    let (there, other) = elsewhere();
    let made = there.ctl_json(&["checkpoint", "import", "web", path(&file), "--json"]);
    assert_eq!(made["checkpoint_id"], 1);
    assert_eq!(made["checkpoint"]["name"], "the good one");
    all_verify(&there);
    done(&there, &CheckpointRestore { project: web(), checkpoint: 1, dry_run: false, paths: Vec::new() });
    assert_eq!(other.read("README.md"), "# As exported\n");
    assert_eq!(fs::read_link(other.path().join("link")).expect("the link"), Path::new("nowhere"));
    assert!(other.path().join("empty").is_dir());
    assert_eq!(fs::metadata(other.path().join("run.sh")).expect("the script").permissions().mode() & 0o777, 0o750);
    let contents = |workspace: &Workspace| -> Vec<_> {
        workspace.fingerprint().into_iter().map(|(path, (_, _, hash))| (path, hash)).collect()
    };
    assert_eq!(contents(&other), contents(&workspace));
    all_verify(&there);
    only_these_are_left(&there, &[1, 2]);
}

#[test]
fn a_file_that_would_break_the_quota_is_refused() {
    let here = Sandbox::start();
    let (_workspace, file) = exported(&here);
    let (there, _other) = elsewhere();
    there.ctl(&["project", "set", "web", "--max-checkpoint-bytes", "4KiB"]);
    let bytes = fs::read(&file).expect("the file");
    let refusal = import(&there, &bytes).expect_err("there is no room");
    assert_eq!(refusal.code, Code::QuotaExceeded);
    assert!(refusal.hint.as_deref().is_some_and(|hint| hint.contains("--max-checkpoint-bytes")), "{refusal:?}");
    only_these_are_left(&there, &[]);
    there.ctl(&["project", "set", "web", "--max-checkpoint-bytes", "0"]);
    import(&there, &bytes).expect("without a quota");
    all_verify(&there);
}

#[test]
fn an_import_into_the_same_daemon_gets_a_new_number_also_in_a_project_of_another_name() {
    let sandbox = Sandbox::start();
    let (_workspace, file) = exported(&sandbox);
    let _ticker = Ticker::start(&sandbox);
    fill_context(&sandbox);
    let again = sandbox.path().join("again.checkpoint");
    checkpoint(&sandbox);
    sandbox.ctl(&["checkpoint", "export", "web", "3", path(&again)]);
    sandbox.ctl(&["checkpoint", "import", "web", path(&file)]);
    assert_eq!(checkpoints(&sandbox).len(), 4);
    let other = sandbox.workspace("other");
    sandbox.ctl(&["project", "create", "other", "--workspace", other.text()]);
    let made = sandbox.ctl_json(&["checkpoint", "import", "other", path(&again), "--json"]);
    assert!(made["warnings"].to_string().contains("'web'"), "{made}");
    // The ids of its context items are in use by the first project.
    done(&sandbox, &CheckpointRestore { project: project("other"), checkpoint: 1, dry_run: false, paths: Vec::new() });
    assert_eq!(other.read("README.md"), "# Later\n");
    all_verify(&sandbox);
    let detail = done(&sandbox, &CheckpointShow { project: project("other"), checkpoint: 1 });
    assert_eq!((detail.manifest.project, detail.manifest.checkpoint), (project("other"), 1));
}

#[test]
fn an_export_replaces_no_file_and_leaves_no_half_of_one() {
    let sandbox = Sandbox::start();
    let (_workspace, file) = exported(&sandbox);
    let before = fs::read(&file).expect("the file");
    let again = sandbox.ctl_output(&["checkpoint", "export", "web", "2", path(&file)]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("already exists"));
    assert_eq!(fs::read(&file).expect("the file"), before);
    let missing = sandbox.path().join("missing.checkpoint");
    let refused = sandbox.ctl_output(&["checkpoint", "export", "web", "77", path(&missing)]);
    assert_eq!(refused.status.code(), Some(3));
    let left: Vec<_> = fs::read_dir(sandbox.path())
        .expect("list the sandbox")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("checkpoint") && name != FILE)
        .collect();
    assert_eq!(left, Vec::<String>::new());
    let nothing = refusal(sandbox.rpc().call(&CheckpointDownload { offset: 0 })).expect_err("nothing was exported");
    assert_eq!(nothing.code, Code::InvalidParams);
}

#[test]
fn a_file_that_is_cut_off_changed_newer_or_something_else_is_refused_and_leaves_nothing() {
    let here = Sandbox::start();
    let (_workspace, file) = exported(&here);
    let good = fs::read(&file).expect("the file");
    let (there, _other) = elsewhere();
    let mut bad: Vec<(String, Vec<u8>)> = vec![
        ("empty".into(), vec![b'x']),
        ("newer".into(), [b"fermata-checkpoint 2\n", &good[21..]].concat()),
        ("longer".into(), [&good[..], b"x"].concat()),
    ];
    for cut in [10, 21, 30, 200, good.len() / 2, good.len() - 66, good.len() - 1] {
        bad.push((format!("cut at {cut}"), good[..cut].to_vec()));
    }
    for at in [0, 20, 25, 60, 500, good.len() / 3, good.len() / 2, good.len() - 80, good.len() - 2] {
        let mut flipped = good.clone();
        flipped[at] ^= 0x20;
        bad.push((format!("flipped at {at}"), flipped));
    }
    for (what, bytes) in bad {
        let refusal = import(&there, &bytes).expect_err(&what);
        assert_eq!(refusal.code, Code::BundleRefused, "{what}: {refusal:?}");
        assert!(refusal.message.starts_with("the file cannot be imported: "), "{what}: {refusal:?}");
    }
    only_these_are_left(&there, &[]);
    import(&there, &good).expect("the good file");
    all_verify(&there);
}

#[test]
fn a_file_whose_checksum_is_right_and_whose_parts_are_wrong_is_refused() {
    use sha2::Digest as _;
    let here = Sandbox::start();
    let (_workspace, file) = exported(&here);
    let good = fs::read(&file).expect("the file");
    let (there, _other) = elsewhere();
    let seal = |mut body: Vec<u8>| {
        let sum: String = sha2::Sha256::digest(&body).iter().map(|byte| format!("{byte:02x}")).collect();
        body.extend_from_slice(sum.as_bytes());
        body.push(b'\n');
        body
    };
    let body = &good[..good.len() - 65];
    let second = body.iter().position(|b| *b == b'\n').expect("a first line") + 1;
    let third = second + body[second..].iter().position(|b| *b == b'\n').expect("a second line") + 1;
    let end = third + body[third..].iter().position(|b| *b == b'\n').expect("a header");
    let header = String::from_utf8(body[third..end].to_vec()).expect("JSON");
    let with_header = |header: &str| {
        let mut made = format!("fermata-checkpoint 1\n{}\n{header}", header.len()).into_bytes();
        made.extend_from_slice(&body[end..]);
        seal(made)
    };
    // An object in the pack, and the name of a part.
    let mut damaged = body.to_vec();
    let at = damaged.len() - 3000;
    damaged[at] ^= 1;
    let traversal = with_header(&header.replace("\"context.json\",\"bytes\"", "\"../../x.json\",\"bytes\""));
    let renamed = with_header(&header.replace("\"context.json\",\"bytes\"", "\"contexts.json\",\"bytes\""));
    assert_ne!(traversal, good);
    let long = format!("\"description\":\"{}\"", "x".repeat(501));
    let (from, end_of_text) = (header.find("\"description\":\"").expect("a description"), "\",\"trigger\"");
    let until = from + header[from..].find(end_of_text).expect("what follows it") + 1;
    let wordy = with_header(&format!("{}{long}{}", &header[..from], &header[until..]));
    let all = [("damaged", seal(damaged)), ("traversal", traversal), ("renamed", renamed), ("wordy", wordy)];
    for (what, bytes) in all {
        let refusal = import(&there, &bytes).expect_err(what);
        assert_eq!(refusal.code, Code::BundleRefused, "{what}: {refusal:?}");
    }
    only_these_are_left(&there, &[]);
}

#[test]
fn pieces_that_do_not_follow_each_other_are_refused() {
    let sandbox = Sandbox::start();
    let mut client = sandbox.rpc();
    let piece = |offset| CheckpointUpload { offset, data: Bytes(vec![1; 10]) };
    assert_eq!(refusal(client.call(&piece(5))).expect_err("a gap").code, Code::InvalidParams);
    client.call(&piece(0)).expect("the first");
    assert_eq!(client.call(&piece(10)).expect("the second").bytes, 20);
    assert_eq!(refusal(client.call(&piece(30))).expect_err("a gap").code, Code::InvalidParams);
    let large = CheckpointUpload { offset: 0, data: Bytes(vec![1; 600_000]) };
    assert_eq!(refusal(client.call(&large)).expect_err("too much").code, Code::TooLarge);
}

#[test]
fn an_import_that_is_repeated_under_its_key_happens_once() {
    let here = Sandbox::start();
    let (_workspace, file) = exported(&here);
    let good = fs::read(&file).expect("the file");
    let (there, _other) = elsewhere();
    use sha2::Digest as _;
    let sha256: String = sha2::Sha256::digest(&good).iter().map(|byte| format!("{byte:02x}")).collect();
    let params = serde_json::json!({"project": "web", "sha256": sha256, "idempotency_key": "once"});
    let params = params.as_object().expect("an object").clone();
    let mut client = there.rpc();
    let mut offset = 0;
    for piece in good.chunks(400_000) {
        offset = client.call(&CheckpointUpload { offset, data: Bytes(piece.to_vec()) }).expect("send").bytes;
    }
    let first = client.call_raw("checkpoint.import", params.clone(), |_| {}).expect("import");
    // The answer was lost; the next connection sends no file, and none is needed.
    let second = there.rpc().call_raw("checkpoint.import", params, |_| {}).expect("the same import");
    assert_eq!(first, second);
    assert_eq!(checkpoints(&there).len(), 1);
}

#[test]
fn a_daemon_that_dies_in_an_import_leaves_nothing_or_a_whole_checkpoint() {
    let here = Sandbox::start();
    let (_workspace, file) = exported(&here);
    let good = fs::read(&file).expect("the file");
    let points = [
        ("import.begin", 0),
        ("import.unpacked", 0),
        ("checkpoint.placed", 0),
        ("history.import.moved", 0),
        ("history.import.published", 0),
        ("import.sealed", 0),
        ("checkpoint.commit", 0),
        ("checkpoint.committed", 1),
    ];
    for (point, left) in points {
        let mut sandbox = Sandbox::builder().env(FAILPOINT, &format!("{point}=abort")).start();
        let workspace = sandbox.workspace("elsewhere");
        sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
        let mut client = sandbox.rpc();
        let mut offset = 0;
        for piece in good.chunks(400_000) {
            offset = client.call(&CheckpointUpload { offset, data: Bytes(piece.to_vec()) }).expect("send").bytes;
        }
        use sha2::Digest as _;
        let sha256 = sha2::Sha256::digest(&good).iter().map(|byte| format!("{byte:02x}")).collect();
        client.call(&CheckpointImport { project: web(), sha256 }).expect_err("the daemon dies");
        sandbox.wait_for_daemon();
        sandbox.forget_env(FAILPOINT);
        sandbox.start_daemon();
        settled(&sandbox);
        let numbers: Vec<u64> = (1..=left).collect();
        only_these_are_left(&sandbox, &numbers);
        import(&sandbox, &good).expect("import again");
        all_verify(&sandbox);
    }
}

#[test]
fn consolidated_checkpoints_are_what_they_were() {
    let sandbox = Sandbox::start();
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    for round in 0..6 {
        workspace.write("README.md", format!("{}round {round}\n", "a line\n".repeat(40)));
        checkpoint(&sandbox);
    }
    let result = done(&sandbox, &CheckpointConsolidate { project: web(), everything: false });
    assert!(result.packs >= 6, "{result:?}");
    assert!(result.bytes_after < result.bytes_before && result.deltas > 0, "{result:?}");
    let nothing = sandbox.ctl(&["checkpoint", "consolidate", "web", "--everything"]);
    assert!(nothing.contains("nothing to consolidate"), "{nothing}");
    all_verify(&sandbox);
    done(&sandbox, &CheckpointRestore { project: web(), checkpoint: 2, dry_run: false, paths: Vec::new() });
    assert!(workspace.read("README.md").ends_with("round 1\n"));
}

#[test]
fn packs_are_consolidated_by_themselves() {
    let sandbox = Sandbox::start();
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    for round in 0..33 {
        workspace.write("README.md", format!("round {round}\n"));
        checkpoint(&sandbox);
    }
    let packs = || {
        let dir = project_dir(&sandbox).join("history/history.git/objects/pack");
        let names = fs::read_dir(dir).expect("list the packs").flatten().map(|entry| entry.file_name());
        names.filter(|name| name.to_string_lossy().ends_with(".pack")).count()
    };
    fermata_tests::waiting::wait_until(fermata_tests::waiting::SOON, "the packs to be consolidated", || packs() < 5);
    let logged = || sandbox.log().contains("packs were consolidated");
    fermata_tests::waiting::wait_until(fermata_tests::waiting::SOON, "the log to tell of it", logged);
    all_verify(&sandbox);
}

#[test]
fn a_consolidation_that_fails_changes_nothing_and_is_reported_once() {
    let sandbox = Sandbox::builder().env(FAILPOINT, "history.consolidation.written=error").start();
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    sandbox.ctl(&["project", "set", "web", "--keep-manual", "100"]);
    let failures = || sandbox.log().matches("could not be consolidated").count();
    for round in 0..33 {
        workspace.write("README.md", format!("round {round}\n"));
        checkpoint(&sandbox);
    }
    fermata_tests::waiting::wait_until(fermata_tests::waiting::SOON, "the failure to be reported", || failures() == 1);
    for round in 33..36 {
        workspace.write("README.md", format!("round {round}\n"));
        checkpoint(&sandbox);
    }
    assert_eq!(failures(), 1);
    all_verify(&sandbox);
    // An explicit consolidation succeeds nevertheless.
    let result = done(&sandbox, &CheckpointConsolidate { project: web(), everything: false });
    assert!(result.packs >= 36, "{result:?}");
    all_verify(&sandbox);
}
