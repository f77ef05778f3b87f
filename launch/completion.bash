# Completion of `sparsellm ...` and of its modules, `python -m launch ...`, in bash:  source <(sparsellm completion bash)
_complete_sparsellm() {
    local words=() line=${COMP_LINE:0:COMP_POINT} command
    case $line in
        *"-m launch.plan "*) command=(python -m launch.console); words=(plan); line=${line#*-m launch.plan } ;;
        *"-m launch "*) command=(python -m launch.console); words=(launch); line=${line#*-m launch } ;;
        *sparsellm\ *) command=(sparsellm); line=${line#*sparsellm } ;;
        *) return ;;
    esac
    [[ ${command[0]} == python ]] && command[0]=${COMP_WORDS[0]}
    local typed
    read -ra typed <<< "$line"
    words+=("${typed[@]}")
    # After a space the word to complete is a new, empty one.
    [[ $line == "" || $line == *" " ]] && words+=("")
    local IFS=$'\n'
    COMPREPLY=($("${command[@]}" complete "${words[@]}" 2>/dev/null))
    # A shell that splits words at = replaces only the part after it.
    local last=${words[${#words[@]} - 1]}
    if [[ $last == *=* && $COMP_WORDBREAKS == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"${last%%=*}="}"); fi
}
complete -o nospace -o default -F _complete_sparsellm sparsellm python python3 .venv/bin/python .venv/bin/sparsellm
