//! Compares the repository HEAD at the checkpoint with the current one, since a restore moves no branch.

use crate::rules::user_repository::UserRepository;

/// Returns a sentence for the user if the two differ.
pub(crate) fn moved(then: Option<&UserRepository>, now: Option<&UserRepository>) -> Option<String> {
    let stays = "the restore changes files only and leaves the repository as it is";
    match (then, now) {
        (None, _) => None,
        (Some(then), None) => {
            Some(format!("the checkpoint was made {}, and that repository is no longer there; {stays}", position(then)))
        }
        (Some(then), Some(now)) => {
            let same = (&then.head_ref, &then.head, &then.in_progress) == (&now.head_ref, &now.head, &now.in_progress);
            let sentence = || {
                format!(
                    "the checkpoint was made {}, and the repository is {} now; {stays}",
                    position(then),
                    position(now)
                )
            };
            (!same).then(sentence)
        }
    }
}

fn position(repository: &UserRepository) -> String {
    let short = repository.head.as_deref().map(|head| head.chars().take(10).collect::<String>());
    let mut text = match (&repository.branch, &repository.head_ref, short) {
        (Some(branch), _, Some(head)) => format!("on branch '{branch}' at {head}"),
        (Some(branch), _, None) => format!("on branch '{branch}' without a commit"),
        (None, Some(name), _) => format!("on '{name}'"),
        (None, None, Some(head)) => format!("at {head} (detached)"),
        (None, None, None) => "on no branch".to_owned(),
    };
    if let Some(doing) = &repository.in_progress {
        text.push_str(&format!(" in the middle of a {}", doing.replace('_', " ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(branch: &str, head: &str) -> UserRepository {
        UserRepository {
            top: "/w".to_owned(),
            linked: false,
            head_ref: Some(format!("refs/heads/{branch}")),
            branch: Some(branch.to_owned()),
            head: Some(head.to_owned()),
            in_progress: None,
        }
    }

    #[test]
    fn a_repository_that_has_moved_is_reported_and_an_unmoved_one_is_not() {
        let then = repository("main", "0123456789abcdef");
        assert_eq!(moved(Some(&then), Some(&then.clone())), None);
        assert_eq!(moved(None, Some(&then)), None);
        let now = UserRepository { in_progress: Some("rebase".to_owned()), ..repository("side", "fedcba9876543210") };
        let text = moved(Some(&then), Some(&now)).unwrap();
        assert!(text.contains("on branch 'main' at 0123456789"), "{text}");
        assert!(text.contains("on branch 'side' at fedcba9876 in the middle of a rebase"), "{text}");
        assert!(moved(Some(&then), None).is_some());
    }
}
